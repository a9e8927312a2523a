"""Each known fault has a test of its name, and docs/robustness.md says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from runpy import run_path

from known_faults import SENTENCES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/update_robustness"


def test_the_document_names_every_fault_and_its_tests():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_known_fault_has_a_test():
    tests = run_path(str(SCRIPT))["tests_by_fault"]()
    missing = sorted(SENTENCES.keys() - tests.keys())
    assert not missing, f"known faults without a test: {', '.join(missing)}"
    # The control: the reader of markers names the test that has one, and this file has none.
    assert any("test_status_fuzz.py" in test for test in tests["malformed_status_file"])
    assert not any("test_known_faults.py" in test for named in tests.values() for test in named)

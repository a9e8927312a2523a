"""docs/attention.md is what the routing table says, and names each of its parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ascend_patch.kernels.attention import refusals, releases, table

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/attention.md").read_text(encoding="utf-8")


def check(root: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(root / "scripts/update_attention"), "--check"]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_it_is_up_to_date():
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_text_is_noticed(tmp_path):
    for name in ("scripts/update_attention", "docs/attention.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "ascend_patch").symlink_to(ROOT / "ascend_patch")
    document = tmp_path / "docs/attention.md"
    document.write_text(TEXT.replace("window - 1 before", "window before"), encoding="utf-8")
    done = check(tmp_path)
    assert done.returncode == 1
    assert "run scripts/update_attention" in done.stdout


def test_every_row_refusal_and_behaviour_is_in_it():
    for row in table.ROWS:
        assert f"| {row.name} |" in TEXT
    for refusal in refusals.REFUSALS:
        assert f"| {refusal.name} |" in TEXT
    for behaviour in releases.behaviours():
        line = f"| {behaviour.name} | {behaviour.when} |"
        assert TEXT.count(line) >= len(behaviour.releases), line


def test_a_cell_has_no_bar_of_its_own():
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4, 7, 10}

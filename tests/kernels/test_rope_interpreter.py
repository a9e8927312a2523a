"""The Triton kernel on CPU, under Triton's interpreter: every variant, a spread of the cases.

Needs triton in the environment that runs the tests (`pip install triton`, 3.0 or newer).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parent


def wrong_cases(*arguments: str) -> tuple[dict, int]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "rope_interpreted.py"), *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {case: error for case, error in found.items() if error}, len(found)


@pytest.mark.parametrize("variant", ["split", "token", "loops", "ascend", "other"])
def test_the_interpreted_kernel_matches_the_oracle(variant):
    wrong, count = wrong_cases(variant)
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong.items())
    assert count >= 10


def test_every_pair_of_factors_matches_the_oracle(seed):
    """Style, dtypes, sizes, counts, tokens, strides, positions, sections, and the variant."""
    wrong, count = wrong_cases("product", str(seed))
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong.items())
    assert count >= 200

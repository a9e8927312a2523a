"""The Triton kernel compiled for Ascend, each case, and executed on x86 as Ascend lowers it.

No NPU and no CANN is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it
(default: the one that runs the tests). ascend_offline.py says what to install there. The static
score of each case, `-k table -s`, is printed as a table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("ASCEND_TRITON_PYTHON", sys.executable)
NEEDED = "triton-ascend 3.2.0 and ascendnpu-ir 1.2.0"
PROBE = (
    "import importlib.util as u, os; s = u.find_spec('triton'); "
    "assert u.find_spec('ascendnpuir'); "
    "assert os.path.isdir(s.submodule_search_locations[0] + '/backends/ascend')"
)

pytestmark = pytest.mark.slow


def results(mode: str, architecture: str = "Ascend910B3") -> dict:
    if subprocess.run([PYTHON, "-c", PROBE], capture_output=True).returncode:
        pytest.skip(f"{NEEDED} are not installed for {PYTHON} (ASCEND_TRITON_PYTHON)")
    path = os.pathsep.join((str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_ASCEND_ARCH": architecture}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    script = [PYTHON, str(HERE / "rope_ascend.py"), mode]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "architecture", ["Ascend910B1", "Ascend910B3", "Ascend910B4", "Ascend910_9391"]
)
def test_every_case_compiles_and_fits(architecture):
    """Each in one launch, and inside the bound that kernels/rope/tiles.py works with."""
    rows = results("compile", architecture)
    assert len(rows) > 300
    too_big = {name: row for name, row in rows.items() if row["buffer"] > row["bound"]}
    assert not too_big
    assert all(row["launches"] <= 1 for row in rows.values())
    assert all(0 < row["buffer"] <= 192 * 1024 for row in rows.values())
    worst = max(row["bytes_moved"] / max(row["bytes_least"], 1) for row in rows.values())
    assert worst < 1.25, "only MRoPE reads more than it must: three rows of angles for one"


def test_table_of_the_static_score():
    rows = results("compile")
    print(f"\n{'case':90} launches moved/least  buffer KiB (of 192)  tiles")
    for name, row in rows.items():
        ratio = row["bytes_moved"] / max(row["bytes_least"], 1)
        kib = row["buffer"] / 1024
        print(f"{name:90} {row['launches']:8} {ratio:11.3f} {kib:11.1f} {row['tiles']:>14}")


def test_lowered_kernels_execute_on_x86():
    for tool in ("/usr/lib/llvm-19/bin/mlir-translate", "/usr/lib/llvm-19/bin/llc", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (Debian: mlir-19-tools, llvm-19, gcc)")
    found = results("execute")
    wrong = {case: error for case, error in found.items() if error}
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong.items())
    assert len(found) > 20

"""The merge kernel compiled for Ascend, each case, and executed on x86 as Ascend lowers it.

No NPU and no CANN is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it
(default: the one that runs the tests). ascend_offline.py says what to install there. What is found
is committed as docs/ascend/kv.csv; `kv_ascend.py write` writes it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.kv_layout import cases, merge, merge_triton  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "ascend" / "kv.csv"
PYTHON = os.environ.get("ASCEND_TRITON_PYTHON", sys.executable)
NEEDED = "triton-ascend 3.2.0 and ascendnpu-ir 1.2.0"
PROBE = (
    "import importlib.util as u, os; s = u.find_spec('triton'); "
    "assert u.find_spec('ascendnpuir'); "
    "assert os.path.isdir(s.submodule_search_locations[0] + '/backends/ascend')"
)
ARCHITECTURES = ["Ascend910B1", "Ascend910B3", "Ascend910B4", "Ascend910_9391"]


def results(mode: str, architecture: str = "Ascend910B3") -> dict:
    """{"versions": of the compiler, "rows": {case: what kv_ascend.py found}}."""
    if subprocess.run([PYTHON, "-c", PROBE], capture_output=True).returncode:
        pytest.skip(f"{NEEDED} are not installed for {PYTHON} (ASCEND_TRITON_PYTHON)")
    path = os.pathsep.join((str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_ASCEND_ARCH": architecture}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    script = [PYTHON, str(HERE / "kv_ascend.py"), mode]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def committed() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_case_compiles_and_fits(architecture):
    """As much unified buffer as was foreseen; what is written waits for all that is read."""
    found = results("compile", architecture)["rows"]
    assert list(found) == [str(case) for case in cases.CASES]
    for case, row in found.items():
        assert row["buffer"] == row["foreseen"] <= 192 * 1024, case
        assert row["waits"], case
        assert row["bytes_at_a_time"] >= 128, case


@pytest.mark.slow
def test_lowered_kernels_move_every_byte_once():
    for tool in ("/usr/lib/llvm-19/bin/mlir-translate", "/usr/lib/llvm-19/bin/llc", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (Debian: mlir-19-tools, llvm-19, gcc)")
    found = results("table")
    for case, row in found["rows"].items():
        assert row["wrong"] == 0, case
        assert row["written"] == row["least"], case
        # Where caches and blocks are: six numbers a task.
        assert row["read"] <= row["least"] + 6 * 8 * 16, case
    versions = {row["compiler"] for row in committed().values()}
    if versions != {found["versions"]}:
        pytest.skip(f"the committed table is of {versions}, here is {found['versions']}")
    table = {
        case: {name: str(value) for name, value in row.items()}
        for case, row in found["rows"].items()
    }
    for row in committed().values():
        row.pop("compiler")
        assert table[row.pop("case")] == row


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (cases.UNEVEN[0], "shards must have equally many heads"),
        (cases.UNEVEN[2], "the number of shards must be a power of two"),
        (cases.UNEVEN[3], "the block_size must be a power of two"),
        (cases.MergeCase((1,) * 64, block_size=128, width=8), "must fit the unified buffer"),
    ],
)
def test_what_an_npu_leaves_to_the_reference(case, reason):
    caches, ids, _ = cases.make_inputs(case, 0)
    call = merge.MergeCall(tuple(caches), tuple(caches), tuple(ids), case.shards)
    ok, found = merge_triton._supports_on_npu(call)
    assert not ok
    assert reason in found

"""The merge kernel compiled for Ascend, each case, and executed on x86 as Ascend lowers it.

No NPU and no CANN is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it
(default: the one that runs the tests). ascend_offline.py says what to install there. What is found
is committed as docs/ascend/kv.csv; `kv_ascend.py write` writes it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import ascend_child
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.kv_layout import cases, merge, merge_triton  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "ascend" / "kv.csv"


def results(mode: str, architecture: str = "Ascend910B3") -> dict:
    return ascend_child.found_by("kv_ascend.py", mode, architecture=architecture)


def committed() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ascend_child.ARCHITECTURES)
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
    ascend_child.executable_here()
    found = results("table")
    for case, row in found["rows"].items():
        assert row["wrong"] == 0, case
        assert row["written"] == row["least"], case
        # Where caches and blocks are: six numbers a task.
        assert row["read"] <= row["least"] + 6 * 8 * 16, case
    ascend_child.same_compiler(found, {row["compiler"] for row in committed().values()})
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

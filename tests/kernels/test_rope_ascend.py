"""The Triton kernels compiled for Ascend, each case, and executed on x86 as Ascend lowers them.

No NPU and no CANN is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it
(default: the one that runs the tests). ascend_offline.py says what to install there. What is found
is committed as docs/ascend/rope.csv; `scripts/ascend_table` writes it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import ascend_child
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "ascend" / "rope.csv"

pytestmark = pytest.mark.slow


def results(mode: str, architecture: str = "Ascend910B3", part: str = "") -> dict:
    return ascend_child.found_by("rope_ascend.py", mode, part, architecture=architecture)


def committed() -> dict[str, dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {f"{row['operator']} {row['case']}": row for row in csv.DictReader(file)}


def same_compiler(found: dict) -> None:
    ascend_child.same_compiler(found, {row["compiler"] for row in committed().values()})


@pytest.mark.parametrize("architecture", ascend_child.ARCHITECTURES)
def test_every_case_compiles_and_fits(architecture):
    """Inside the bound that kernels/rope/tiles.py works with, and as the table has it.

    The fused kernel's is an estimate: near the limit the compiler gives up its double buffering.
    """
    found = results("compile", architecture)
    rows = found["rows"]
    operators = {name.split()[0] for name in rows}
    assert len(operators) == 4
    assert len(rows) > 500
    assert all(0 < row["buffer"] <= 192 * 1024 for row in rows.values())
    too_big = {
        name: row
        for name, row in rows.items()
        if row["buffer"] > row["bound"] and not name.startswith("split_qkv_rmsnorm_rope ")
    }
    assert not too_big
    same_compiler(found)
    table = {name: int(row[f"buffer_{architecture}"]) for name, row in committed().items()}
    assert table == {name: row["buffer"] for name, row in rows.items()}


@pytest.mark.parametrize("part", ["D128r96", "mrope24-20-20", "D80r80-H16"])
def test_bytes_are_as_the_table_has_them(part):
    ascend_child.executable_here()
    found = results("count", part=part)
    same_compiler(found)
    fields = ("launches", "programs", "read", "written", "least")
    table = {
        name: {field: int(row[field]) for field in fields}
        for name, row in committed().items()
        if part in name
    }
    assert found["rows"] == table


def test_hardly_a_byte_is_moved_twice():
    """One launch each. MRoPE reads three rows of angles for one; each program reads its weights."""
    for name, row in committed().items():
        assert int(row["launches"]) <= 1
        assert int(row["programs"]) <= 40
        moved, least = int(row["read"]) + int(row["written"]), int(row["least"])
        assert moved >= least, name
        if least:
            few = row["operator"] == "split_qkv_rmsnorm_rope" and int(row["programs"]) < 10
            assert moved < (1.5 if few else 1.25) * least, name


def test_lowered_kernels_execute_on_x86():
    ascend_child.executable_here()
    found = results("execute")["rows"]
    wrong = {case: error for case, error in found.items() if error}
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong.items())
    assert len(found) > 60
    assert len({name.split()[0] for name in found}) == 4

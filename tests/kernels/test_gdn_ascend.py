"""chunk_gated_delta_rule's kernels for Ascend: interpreted, compiled, executed on x86, and counted.

No NPU and no CANN is needed; but for the first test an interpreter with triton-ascend is:
ASCEND_TRITON_PYTHON names it (default: the one that runs the tests). ascend_offline.py says what to
install there. What is found is committed as docs/ascend/gdn.csv; `scripts/ascend_table` writes it.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import ascend_child
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.gdn import ascend_tiles, chunk, chunk_ascend  # noqa: E402
from ascend_patch.kernels.triton_device import has_triton  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "ascend" / "gdn.csv"
# Root mean square; four roundings of operands and one of the result.
LIMITS = {"float16": 4e-3, "bfloat16": 6e-3}
L1, L0C = 512 * 1024, 128 * 1024
OURS = "ours"


def results(*arguments: str, architecture: str = "Ascend910B3") -> dict:
    return ascend_child.found_by("gdn_ascend.py", *arguments, architecture=architecture)


def committed(of: str = "", operator: str = chunk.OPERATOR) -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["operator"] == operator or not operator]
    return [row for row in rows if row["of"] == of or not of]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernels_are_the_recurrence(seed):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_ascend_interpreted.py"), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert len(found) == 6
    # Not the largest: no comparison with NaN is true.
    assert all(error <= LIMITS["float16"] for errors in found.values() for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "part"),
    [
        ("Ascend910B3", ""),
        ("Ascend910B1", "K128V128-KV"),
        ("Ascend910B4", "K128V128-KV"),
        ("Ascend910_9391", "K128V128-KV"),
    ],
)
def test_every_shape_compiles_and_fits(architecture, part):
    rows = results("compile", part, architecture=architecture)["rows"]
    print(len(rows), max(row["unified_buffer"] for row in rows.values()))
    assert len(rows) == (8 if part else 120)
    for name, row in rows.items():
        assert 0 < row["unified_buffer"] <= ascend_tiles.UNIFIED_BUFFER, name
        assert 0 < row["l1"] <= L1, name
        assert 0 < row["l0c"] <= L0C, name


@pytest.mark.slow
def test_lowered_kernels_execute_on_x86(seed):
    ascend_child.executable_here()
    found = results("execute", str(seed))["rows"]
    print(found)
    assert len(found) == 6
    for case, errors in found.items():
        assert all(error <= LIMITS[case.split("-")[0]] for error in errors), case
    # Where there are tokens the operands were rounded: nobody else computed it.
    assert sum(max(errors) > 1e-4 for errors in found.values()) == 5


@pytest.mark.slow
def test_the_score_is_as_the_table_has_it():
    found = results("score", "1x2048")
    ascend_child.same_compiler(found, {row["compiler"] for row in committed(OURS)})
    table = {(row["case"], row["kernel"]): row for row in committed(OURS)}
    counted = 0
    for case, row in found["rows"].items():
        for launch in row["launches"]:
            there = table[case, launch["kernel"]]
            assert {name: str(value) for name, value in launch.items()} == {
                name: there[name] for name in launch
            }
            counted += 1
    assert counted == 8


def test_a_call_is_two_launches_of_a_fixed_grid():
    rows = committed(OURS)
    assert len(rows) == 48
    assert {row["kernel"] for row in rows} == {"prepare_loop", "scan_loop"}
    assert all(int(row["programs"]) <= 20 for row in rows)


def test_a_call_moves_less_than_vllm_ascends_own():
    """Tensors through global memory; what cores hand each other is in the table beside it.

    But for one sequence on four ranks or more, where states are parted for cores that would idle.
    """
    moved: dict[tuple[str, str], int] = {}
    for row in committed():
        key = row["of"], row["case"]
        moved[key] = moved.get(key, 0) + int(row["read"]) + int(row["written"])
    cases = {case for _, case in moved}
    [other] = {of for of, _ in moved} - {OURS}
    assert len(cases) == 24
    parted = {case for case in cases if case.startswith("1x") and ("tp4" in case or "tp8" in case)}
    assert len(parted) == 6
    for case in cases:
        more = 1.2 if case in parted else 1.0
        assert moved[OURS, case] < more * moved[other, case], case


def test_the_other_kernels_hardly_move_a_byte_twice():
    """One launch each. A program of the convolution reads its weights, and a chunk's last rows."""
    rows = [row for row in committed(OURS, operator="") if row["operator"] != chunk.OPERATOR]
    assert len({row["operator"] for row in rows}) == 5
    for row in rows:
        moved, least = int(row["read"]) + int(row["written"]), int(row["least"])
        few = row["case"].startswith("conv-decode")
        assert least <= moved < (1.5 if few else 1.05) * least, row["case"]
        assert int(row["programs"]) <= 40
        assert 0 < int(row["unified_buffer"]) <= ascend_tiles.UNIFIED_BUFFER


@pytest.mark.parametrize("cores", [20, 24, 25])
@pytest.mark.parametrize(
    ("size", "width"), [(64, 64), (128, 128), (256, 256), (256, 64), (64, 256)]
)
def test_columns_fit_and_keep_the_cores_at_work(size, width, cores):
    for sequences in (1, 2, 8, 64):
        for heads in (1, 4, 8, 16, 32):
            columns = ascend_tiles.scan_columns(size, width, sequences, heads, cores)
            assert width % columns == 0
            assert ascend_tiles.scan_bytes(size, columns) <= ascend_tiles.UNIFIED_BUFFER
            if columns > 32:
                assert sequences * heads * (width // columns) >= cores
    assert ascend_tiles.prepare_bytes() <= ascend_tiles.UNIFIED_BUFFER
    # What was refused by 128 bytes.
    assert ascend_tiles.scan_bytes(256, 128) > ascend_tiles.UNIFIED_BUFFER


def test_nobody_offers_them_without_triton_for_ascend():
    if has_triton("ascend"):
        pytest.skip("triton for Ascend is installed")
    assert chunk_ascend.register() is False

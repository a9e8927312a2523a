"""The Triton kernels of chunk_gated_delta_rule: under the interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gdn_judge
import pytest
from gdn_oracle import Case

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.gdn import chunk, chunk_fused, chunk_triton  # noqa: E402

FORMS = (chunk_triton.NAME, chunk_fused.NAME)

HERE = Path(__file__).resolve().parent
RAGGED = (1, 63, 0, 64, 65, 127, 4097, 2)
# Root mean square; four roundings of operands and one of the result.
LIMITS = {"float16": 4e-3, "bfloat16": 6e-3}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernels_are_the_recurrence(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_interpreted.py"), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert len(found) == 12
    # No comparison of NaN is true: what is right is asked for.
    limit = LIMITS["float16"]
    wrong = {case: e for case, e in found.items() if not all(error <= limit for error in e)}
    assert not wrong


@pytest.fixture
def on_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    chunk_triton.register()
    yield
    for name in FORMS:
        dispatch.unregister(chunk.OPERATOR, "cuda", name)


CASES = [
    Case(RAGGED, key_size=128),
    Case(RAGGED, layout="KV", states="cache", sliced=True, tail=3),
    Case(RAGGED, key_size=256, value_size=256, decay=20.0),
    Case(RAGGED, key_size=256, value_size=64, states="none"),
    Case((200, 130), same_keys=True, decay=1e-4),
    Case((128, 300), states="cache", normalise=False),
    Case((0, 0)),
    Case((32,) * 64, key_heads=4, value_heads=8, key_size=128),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_computes_the_recurrence(
    on_gpu: None, case: Case, dtype: str, form: str, seed: int
) -> None:
    def run(**arguments):
        with dispatch.only(form):
            from ascend_patch.kernels import gdn

            return gdn.chunk_gated_delta_rule(**arguments)

    errors = gdn_judge.judge(replace(case, dtype=dtype), seed, "cuda", run)
    print(errors)
    assert all(error < LIMITS[dtype] for error in errors)


def test_a_state_is_parted_until_there_are_programs_enough() -> None:
    assert chunk_triton.columns_of(128, 8 * 32) == 64
    assert chunk_triton.columns_of(128, 1 * 32) == 32
    assert chunk_triton.columns_of(128, 1 * 8) == 16
    assert chunk_triton.columns_of(64, 10_000) == 64


def test_parts_are_wide_where_a_load_does_not_run_ahead() -> None:
    assert chunk_triton.columns_of(128, 1, narrow=False) == 64
    row = torch.zeros(3, 2 * 128 + 8, dtype=torch.bfloat16)
    assert chunk_triton.runs_ahead(row[:, :256].unflatten(1, (2, 128)))
    assert not chunk_triton.runs_ahead(row[:, :256].unflatten(1, (1, 256)))
    assert not chunk_triton.runs_ahead(row[:, 1:257].unflatten(1, (2, 128)))
    assert not chunk_triton.runs_ahead(
        row.flatten()[: 3 * 257].view(3, 257)[:, :256].unflatten(1, (2, 128))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_size": 96}, "K and V must each be 64, 128 or 256"),
        ({"dtype": "float32"}, "q, k and v must be bfloat16 or float16"),
    ],
)
def test_what_the_kernels_do_not_take(change: dict, reason: str) -> None:
    seen = []

    def supports(call):
        seen.append(chunk_triton.supports(call))
        return seen[-1]

    dispatch.register(
        chunk.OPERATOR, "cpu", dispatch.Implementation("t", chunk_triton.run, supports, 9)
    )
    try:
        out, _ = gdn_judge.judge(replace(Case((5,), dtype="float16"), **change), 1)
    finally:
        dispatch.unregister(chunk.OPERATOR, "cpu", "t")
    # The reference ran instead.
    assert out < 1e-3
    assert seen == [(False, reason)]

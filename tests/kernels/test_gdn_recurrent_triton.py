"""The Triton kernels of a decode step and its gates: under the interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gdn_decode_gates import gates_in_fp64, make_gates, worst
from gdn_decode_judge import judge_decode
from gdn_decode_oracle import DecodeCase, make_decode

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch, gdn  # noqa: E402
from ascend_patch.kernels.gdn import (  # noqa: E402
    gating,
    gating_triton,
    recurrent,
    recurrent_triton,
)

HERE = Path(__file__).resolve().parent
# Root mean square of one rounding: at most half a unit.
LIMITS = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernels_are_the_formulas(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_decode_interpreted.py"), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    for kind in ("cuda", "npu"):
        assert len(found[kind]) == 8
        for case, errors in found[kind].items():
            dtypes = [dtype for dtype in LIMITS if f" dtype={dtype}" in case]
            # The interpreter cuts off what does not fit bfloat16.
            limit = LIMITS[(*dtypes, "float32")[0]] * (2 if "bfloat16" in dtypes else 1)
            assert all(error < limit for error in errors), (kind, case)
    assert len(found["gates"]) == 4
    assert max(found["gates"].values()) < 1e-6, found["gates"]


@pytest.fixture
def on_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    for module in (recurrent_triton, gating_triton):
        module.register()
    yield
    dispatch.unregister(recurrent.OPERATOR, "cuda", recurrent_triton.NAME)
    dispatch.unregister(gating.OPERATOR, "cuda", gating_triton.NAME)


def run(**arguments):
    with dispatch.only(recurrent_triton.NAME):
        return gdn.recurrent_gated_delta_rule(**arguments)


SIZES = {"key_heads": 4, "value_heads": 8, "key_size": 128}
RAGGED = (1, 3, 0, 2, 4)
CASES = [
    DecodeCase(1, sliced=True, **SIZES),
    DecodeCase(5, layout="KV", sliced=True, padded=(1, 3), rows=2, **SIZES),
    DecodeCase(100, raw=False, **SIZES),
    DecodeCase(100, raw=False, layout="KV", **SIZES),
    DecodeCase(3, key_size=256, value_size=256, key_heads=1, scale=0.5),
    DecodeCase(3, key_size=256, value_size=64, key_heads=1, layout="KV", raw=False, decay=20.0),
    DecodeCase(70, key_size=64, value_size=256, normalise=False, layout="KV"),
    DecodeCase(lengths=RAGGED, width=4, tail=3, rows=1, sliced=True, **SIZES),
    DecodeCase(lengths=RAGGED, width=4, layout="KV", padded=(1, 2), **SIZES),
    DecodeCase(lengths=RAGGED, width=2, accepted=False, raw=False),
    DecodeCase(lengths=RAGGED, layout="KV", padded=(4,)),
    DecodeCase(lengths=(1,) * 80, **SIZES),
    DecodeCase(0),
]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_computes_the_recurrence(
    on_gpu: None, case: DecodeCase, dtype: str, state_dtype: str, seed: int
) -> None:
    case = replace(case, dtype=dtype, state_dtype=state_dtype)
    out, states = judge_decode(case, seed, "cuda", run)
    print(out, states)
    assert out < LIMITS[dtype]
    assert states < LIMITS[state_dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 32), (0, 4), (70, 12), (5000, 48)])
def test_a_gpu_computes_the_gates(on_gpu: None, shape, dtype: str, seed: int) -> None:
    given = make_gates(*shape, dtype, seed, "cuda")
    with dispatch.only(gating_triton.NAME):
        assert worst(gdn.fused_gating(**given), gates_in_fp64(**given)) < 4e-6


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=str)
def test_a_step_is_one_launch_and_reads_nothing_back(on_gpu: None, case: DecodeCase, seed) -> None:
    """Captured once, replayed on other slots, lengths and counts of accepted tokens."""
    case = replace(case, dtype="bfloat16")
    given, other = (make_decode(case, seed + n, "cuda").arguments for n in (0, 1))
    out = torch.empty_like(given["v"], memory_format=torch.contiguous_format)
    run(**given, out=out)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(**given, out=out)
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert [name for name in launched if "recurrent" in name] == launched
    assert len(launched) == 1
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(**given, out=out)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    wanted_state = other["state"].clone()
    wanted = run(**{**other, "state": wanted_state})
    for name, x in given.items():
        if torch.is_tensor(x):
            x.copy_(other[name])
    graph.replay()
    tokens = sum(case.counts)
    assert torch.equal(out[:, :tokens], wanted[:, :tokens])
    assert torch.equal(given["state"], wanted_state)


def wide(x):
    """The same numbers, every second element in memory."""
    return torch.stack((x, x), -1)[..., 0]


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (DecodeCase(key_size=96), {}, "K and V must each be 64, 128 or 256"),
        (DecodeCase(), {"q": wide}, "heads of a token of q must be adjacent"),
        (DecodeCase(), {"a": wide}, "heads of a must be adjacent"),
        (DecodeCase(), {"state": wide}, "a slot of the state must be contiguous"),
        (
            DecodeCase(lengths=(1, 2)),
            {"cu_seqlens": wide},
            "cu_seqlens must be contiguous",
        ),
    ],
)
def test_what_the_kernel_does_not_take(case: DecodeCase, change: dict, reason: str) -> None:
    seen = []

    def supports(call):
        seen.append(recurrent_triton.supports(call))
        return seen[-1]

    def changed(**arguments):
        arguments |= {name: make(arguments[name]) for name, make in change.items()}
        return gdn.recurrent_gated_delta_rule(**arguments)

    wanted = gdn.recurrent_gated_delta_rule(**make_decode(case, 1).arguments)
    offer = dispatch.Implementation("t", recurrent_triton.run, supports, 9)
    dispatch.register(recurrent.OPERATOR, "cpu", offer)
    try:
        found = changed(**make_decode(case, 1).arguments)
    finally:
        dispatch.unregister(recurrent.OPERATOR, "cpu", "t")
    # The reference ran instead.
    assert torch.equal(found, wanted)
    assert not seen[0][0]
    assert seen[0][1].startswith(reason)

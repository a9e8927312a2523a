"""The gated norm in torch and in Triton, against its formula in fp64; its errors."""

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
from gdn_norm_judge import NormCase, judge_norm, make_norm
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch, gdn  # noqa: E402
from ascend_patch.kernels.gdn import gated_norm, gated_norm_triton  # noqa: E402

HERE = Path(__file__).resolve().parent
CASES = [
    NormCase((70, 128)),
    NormCase((70, 128), before=False, dtype="bfloat16", weight_dtype="float32"),
    NormCase((5, 3, 48), sliced=True, given=True, dtype="float16"),
    NormCase((7, 4, 128), sliced=True, before=False, dtype="bfloat16"),
    NormCase((9, 24), group=8, gate=False),
    NormCase((4, 3, 40), group=20, sliced=True, before=False),
    NormCase((2, 3, 4, 16)),
    NormCase((2, 3, 4, 16), sliced=True),
    NormCase((4000, 1), before=False),
    NormCase((3, 5000), scale=1e-3),
    NormCase((7,), scale=300.0),
    NormCase((3, 0, 8)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_formula(case: NormCase, seed: int, poison: None) -> None:
    share = judge_norm(case, seed)
    print(share)
    assert share <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_rows(outer, groups, size, gate, before, sliced, seed) -> None:
    case = NormCase((*outer, groups * size), group=size, gate=gate, before=before)
    assert judge_norm(replace(case, sliced=sliced and len(outer) > 1), seed) <= 1


def test_what_goes_wrong_is_seen(seed: int) -> None:
    """The judge's own controls: the other order, no gate, and another eps."""
    case = NormCase((70, 128), dtype="bfloat16")
    for change in ({"norm_before_gate": False}, {"gate": None}, {"eps": 0.1}):

        def wrong(change=change, **arguments):
            return gdn.gated_rms_norm(**{**arguments, **change})

        assert judge_norm(case, seed, run=wrong) > 10


def test_x_and_gate_may_be_written_over(seed: int) -> None:
    wanted = gdn.gated_rms_norm(**make_norm(CASES[1], seed))
    for name in ("x", "gate"):
        arguments = make_norm(CASES[1], seed)
        out = gdn.gated_rms_norm(**arguments, out=arguments[name])
        assert out is arguments[name]
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 6).double()}, TypeError, "x must be bfloat16"),
        ({"x": torch.zeros(())}, ValueError, r"x must be \[.., D\]"),
        ({"weight": torch.zeros(2, 6)}, ValueError, "weight must be .6."),
        ({"gate": torch.zeros(3, 6)}, ValueError, "gate must have x's shape"),
        ({"out": torch.zeros(2, 6).half()}, ValueError, "out must be"),
        ({"group_size": 4}, ValueError, "group_size must divide the 6 of a row"),
        ({"group_size": 0}, ValueError, "group_size must divide"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_sentences(change, error, words) -> None:
    call = {"x": torch.zeros(2, 6), "gate": None, "weight": torch.zeros(6), "eps": 1e-6}
    with pytest.raises(error, match=words):
        gdn.gated_rms_norm(**{**call, **change})


@pytest.mark.parametrize(
    ("shape", "change", "reason"),
    [
        ((2, 9000), {}, "a group must have at most 8192 elements"),
        ((2, 6), {"x": torch.zeros(6, 2).t()}, "elements of a row of x must be adjacent"),
        ((2, 6), {"weight": torch.zeros(12)[::2]}, "weight must be contiguous"),
        ((2, 3, 4, 6), {"x": torch.zeros(3, 2, 5, 6)[:, :, :4].transpose(0, 1)}, "rows must lie"),
    ],
    ids=["long", "x", "weight", "rows"],
)
def test_what_the_kernel_does_not_take(shape, change, reason) -> None:
    seen = []

    def supports(call):
        seen.append(gated_norm_triton.supports(call))
        return seen[-1]

    offer = dispatch.Implementation("t", gated_norm_triton.run, supports, 9)
    dispatch.register(gated_norm.OPERATOR, "cpu", offer)
    try:
        found = gdn.gated_rms_norm(**{**make_norm(NormCase(shape), 1), **change})
    finally:
        dispatch.unregister(gated_norm.OPERATOR, "cpu", "t")
    # The reference ran instead.
    assert found.shape == shape
    assert not seen[0][0]
    assert seen[0][1].startswith(reason)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernel_is_the_formula(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_norm_interpreted.py"), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    for kind in ("cuda", "npu"):
        assert len(found[kind]) == 8
        assert max(found[kind].values()) <= 1


@pytest.fixture
def on_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    gated_norm_triton.register()
    with dispatch.only(gated_norm_triton.NAME):
        yield
    dispatch.unregister(gated_norm.OPERATOR, "cuda", gated_norm_triton.NAME)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if len(case.shape) < 4),
        NormCase((20_000, 128)),
        NormCase((700, 32, 128), sliced=True),
        NormCase((64, 6144), group=1536, before=False),
        NormCase((3, 8192), gate=False),
    ],
    ids=str,
)
def test_a_gpu_computes_the_formula(on_gpu: None, case: NormCase, dtype: str, seed: int) -> None:
    share = judge_norm(replace(case, dtype=dtype), seed, "cuda")
    print(share)
    assert share <= 1


def test_it_is_one_launch(on_gpu: None, seed: int) -> None:
    arguments = make_norm(NormCase((700, 32, 128), sliced=True, dtype="bfloat16"), seed, "cuda")
    gdn.gated_rms_norm(**arguments)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gdn.gated_rms_norm(**arguments)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(launched) == 1, launched
    assert "gated_norm" in launched[0]


@pytest.mark.slow
def test_offsets_past_two_to_the_31(on_gpu: None) -> None:
    rows = 17_000_000
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    weight = torch.randn(128, device="cuda")
    wanted = gdn.gated_rms_norm(x[-70:], x[-70:], weight, eps=1e-6)
    assert torch.equal(gdn.gated_rms_norm(x, x, weight, eps=1e-6)[-70:], wanted)

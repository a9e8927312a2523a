"""The Triton kernels of the convolutions: under the interpreter, and on a GPU."""

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
from gdn_conv_judge import judge_conv
from gdn_conv_oracle import ConvCase, make_conv
from gdn_conv_steps import in_drafts, in_pieces, in_tokens, make_stream, whole

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch, gdn  # noqa: E402
from ascend_patch.kernels.gdn import conv, conv_tiles, conv_triton  # noqa: E402

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernels_are_the_convolutions(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_conv_interpreted.py"), str(seed)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    for kind in ("cuda", "npu"):
        assert len(found[kind]) == 22
        wrong = {case: share for case, share in found[kind].items() if share > 1}
        assert not wrong, kind
        for width, ways in found[f"{kind} cut"].items():
            assert ways == dict.fromkeys(("in_pieces", "in_tokens", "in_drafts"), True), width
    assert found["control"] > 10
    assert found["in place"]


@pytest.fixture
def on_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    conv_triton.register()
    with dispatch.only(conv_triton.NAME):
        yield
    for operator in (conv.OPERATOR, conv.UPDATE):
        dispatch.unregister(operator, "cuda", conv_triton.NAME)


RAGGED = (1, 0, 63, 2, 64, 65, 3, 1000, 0)
MODEL = {"channels": 2048, "sliced": True}
PREFILL = [
    *(ConvCase(RAGGED, width=width, places=width + 1) for width in (2, 3, 4, 5)),
    ConvCase(RAGGED, padded=(2, 4, 7), tail=3, cache="gaps", **MODEL),
    ConvCase(RAGGED, padded=(2, 4, 7), tail=3, table=False, **MODEL),
    ConvCase(RAGGED, padded=(0,), tail=3, given=True, channels=1000),
    ConvCase(RAGGED, cache="plain", bias=False, padded=(8,), tail=70, table=False),
    ConvCase(RAGGED, cache="none", silu=False, channels=1, width=3),
    ConvCase((4097,), columns=True, channels=96, state_dtype="float32", weight_dtype="float32"),
    ConvCase((5,) * 300, places=5, table=False),
    ConvCase((0, 0)),
    ConvCase((), cache="none"),
]
UPDATE = [
    *(ConvCase((1,) * 70, width=width, plain=True, places=6) for width in (2, 3, 4, 5)),
    ConvCase((1,) * 70, plain=True, padded=(0, 3, 69), cache="gaps", **MODEL),
    ConvCase((1,) * 5, plain=True, padded=(4,), given=True, channels=1000, cache="plain"),
    ConvCase((1, 0, 3, 2, 7), padded=(3,), tail=2, columns=True, silu=False),
    *(
        ConvCase((3, 0, 1, 2), width=width, places=width + 2, accepted=(1, 2, 3, 1), **MODEL)
        for width in (2, 3, 4, 5)
    ),
    ConvCase((4, 4, 4), places=6, accepted=(4, 1, 2), padded=(1,), given=True, tail=5),
    ConvCase((0, 0), places=4, accepted=(1, 1)),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_a_gpu_computes_prefill(on_gpu: None, case: ConvCase, dtype: str, seed: int) -> None:
    share = judge_conv(replace(case, dtype=dtype), seed, "cuda")
    print(share)
    assert share <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", UPDATE, ids=str)
def test_a_gpu_computes_decode(on_gpu: None, case: ConvCase, dtype: str, seed: int) -> None:
    share = judge_conv(replace(case, dtype=dtype), seed, "cuda", update=True)
    print(share)
    assert share <= 1


@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_however_a_prompt_is_cut_its_bits_are_the_same(on_gpu, width, dtype, seed) -> None:
    """Silu included: prefill and decode share every operation, and nothing races."""
    lengths = (1, 5, 67, 130, 300)
    stream = make_stream(lengths, width, dtype, seed, 300, device="cuda", activation="silu")
    wanted, state = whole(stream)
    for way in (whole, in_pieces, in_tokens, in_drafts):
        for _ in range(2):
            found, after = way(stream)
            assert torch.equal(found, wanted), way.__name__
            assert torch.equal(after, state), way.__name__


@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize("tile", [8, 16, 32, 64])
def test_every_tile_has_the_same_bits(on_gpu, tile, rolls, seed, monkeypatch) -> None:
    case = ConvCase(RAGGED, padded=(3,), tail=9, dtype="bfloat16", **MODEL)
    wanted = gdn.causal_conv1d(**make_conv(case, seed, "cuda").arguments)
    for channels, warps in ((64, 1), (256, 8), (512, 8)):
        tiles = conv_tiles.Tiles(channels, tile, warps, rolls)
        monkeypatch.setattr(conv_tiles, "prefill_tiles", lambda *_, tiles=tiles: tiles)
        assert torch.equal(gdn.causal_conv1d(**make_conv(case, seed, "cuda").arguments), wanted)


def test_one_launch_that_reads_nothing_back(on_gpu: None, seed: int) -> None:
    prefill = make_conv(ConvCase(RAGGED, **MODEL), seed, "cuda").arguments
    decode = make_conv(ConvCase((1,) * 32, plain=True, **MODEL), seed, "cuda", True).arguments
    for function, given in ((gdn.causal_conv1d, prefill), (gdn.causal_conv1d_update, decode)):
        function(**given)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                function(**given)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        launched = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
        assert len(launched) == 1, launched
        assert "conv" in launched[0]


@pytest.mark.parametrize("case", [UPDATE[4], UPDATE[9]], ids=str)
def test_a_captured_step_sees_new_inputs(on_gpu: None, case: ConvCase, seed: int) -> None:
    case = replace(case, dtype="bfloat16", given=True)
    given, other = (make_conv(case, seed + n, "cuda", True).arguments for n in (0, 1))
    gdn.causal_conv1d_update(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gdn.causal_conv1d_update(**given)
    for name, x in given.items():
        if torch.is_tensor(x):
            x.copy_(other[name])
    graph.replay()
    wanted = gdn.causal_conv1d_update(**other)
    torch.cuda.synchronize()
    for found, want in ((given["out"], wanted), (given["conv_state"], other["conv_state"])):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_offsets_past_two_to_the_31(on_gpu: None) -> None:
    # A slot is three tokens long: 100,001 slots.
    tokens, channels = 300_003, 8192
    x = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    last = slice(tokens - 100, tokens)
    wanted = gdn.causal_conv1d(x[tokens - 103 :], weight)[3:]
    assert torch.equal(gdn.causal_conv1d(x, weight)[last], wanted)
    slots = torch.full((1,), 100_000, dtype=torch.int32, device="cuda")
    cache = x.view(-1, 3, channels).transpose(1, 2)
    near = cache[-1:].clone()
    step = gdn.causal_conv1d_update(x[:1].clone(), cache, weight, state_indices=slots)
    wanted = gdn.causal_conv1d_update(x[:1].clone(), near, weight, state_indices=slots * 0)
    assert torch.equal(step, wanted)
    assert torch.equal(cache[-1], near[0])


def wide(x):
    """The same numbers, every second element in memory."""
    return torch.stack((x, x), -1)[..., 0]


@pytest.mark.parametrize("name", ["x", "bias"])
def test_what_the_kernels_do_not_take(name: str, seed: int) -> None:
    arguments = make_conv(ConvCase((9, 4)), seed).arguments
    wanted = gdn.causal_conv1d(**make_conv(ConvCase((9, 4)), seed).arguments)
    seen = []

    def supports(call):
        seen.append(conv_triton.supports(call))
        return seen[-1]

    offer = dispatch.Implementation("t", conv_triton.run, supports, 99)
    dispatch.register(conv.OPERATOR, "cpu", offer)
    try:
        found = gdn.causal_conv1d(**{**arguments, name: wide(arguments[name])})
    finally:
        dispatch.unregister(conv.OPERATOR, "cpu", "t")
    # The reference ran instead.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    words = {"x": "channels of a token of x must be adjacent", "bias": "bias must be contiguous"}
    assert not seen[0][0]
    assert seen[0][1].startswith(words[name])


def test_a_table_of_another_size_is_refused(seed: int) -> None:
    arguments = make_conv(ConvCase((9, 4)), seed).arguments
    metadata = gdn.build_chunk_metadata(
        torch.tensor([0, 9, 13]), torch.device("cpu"), chunk_sizes=(16,)
    )
    seen = []
    offer = dispatch.Implementation("t", lambda call: seen.append(conv_triton.supports(call)))
    dispatch.register(conv.OPERATOR, "cpu", offer)
    try:
        with dispatch.only("t"):
            gdn.causal_conv1d(**{**arguments, "chunk_metadata": metadata})
    finally:
        dispatch.unregister(conv.OPERATOR, "cpu", "t")
    assert seen == [(False, "chunk_metadata must have the table of size 64")]

"""What only a GPU shows of the rotary kernels: graphs, warm-up, streams, offsets past 2**31."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False", allow_module_level=True)

from ascend_patch.kernels import dispatch, rope  # noqa: E402
from ascend_patch.kernels.rope import cases, reference, triton_call  # noqa: E402

CASE = cases.RopeCase(7, 12, 2, 128, 96)


def reference_of(call, options):
    positions, query, key, cache = call
    out = query.new_empty(query.shape), key.new_empty(key.shape)
    reference.rotary_embedding_into(*out, positions, query, key, cache, *options.values())
    return out


def assert_near(got, want):
    """One rounding apart at most: the reference has no fused multiply-add."""
    unit = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=unit, atol=8 * unit * (unit < 1e-6) + 1e-6)


def compiled_kernels():
    """How many variants of the kernel this process has compiled."""
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    return sum(len(entry[0]) for entry in rotary_kernel.device_caches.values())


def test_triton_serves_cuda():
    call = cases.make_inputs(CASE, 0, "cuda")
    out = call[1].clone(), call[2].clone()
    choice = dispatch.select("rotary_embedding", "cuda", *out, *call, *CASE.options.values())
    assert choice.implementation is not None
    assert choice.implementation.name == "triton"


def test_a_row_that_is_not_adjacent_goes_to_the_reference(seed):
    positions, query, key, cache = cases.make_inputs(CASE, seed, "cuda")
    wide = query.repeat_interleave(2, dim=1)[:, ::2]
    out = torch.empty_like(query), torch.empty_like(key)
    call = (*out, positions, wide, key, cache, *CASE.options.values())
    choice = dispatch.select("rotary_embedding", "cuda", *call)
    assert choice.implementation is not None
    assert choice.implementation.name == "reference"
    assert "adjacent" in choice.reason
    got, _ = rope.rotary_embedding(positions, wide, key, cache, **CASE.options)
    want, _ = rope.rotary_embedding(positions, query, key, cache, **CASE.options)
    assert_near(got, want)


@pytest.mark.parametrize("tokens", [1, 16, 257, 70001])
@pytest.mark.parametrize("rotary_dim", [128, 80])
def test_warmed_calls_are_captured_without_compiling(tokens, rotary_dim, seed):
    case = replace(CASE, query_heads=20 + rotary_dim // 16, rotary_dim=rotary_dim)
    assert triton_call.warm(*cases.make_inputs(case, seed, "cuda"), **case.options)
    before = compiled_kernels()
    call = cases.make_inputs(replace(case, tokens=tokens), seed, "cuda")
    want = reference_of(call, case.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rope.rotary_embedding(*call, **case.options)
        rope.rotary_embedding_(*call, **case.options)
    assert compiled_kernels() == before, "the kernel was compiled inside a capture"
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(got, want, call[1:3], strict=True):
        assert_near(a, b)
        assert torch.equal(a, c)


def test_replays_see_new_inputs(seed):
    case = replace(CASE, from_qkv=False)
    call = cases.make_inputs(case, seed, "cuda")
    triton_call.warm(*call, **case.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rope.rotary_embedding(*call, **case.options)
    for other in range(3):
        for held, new in zip(call, cases.make_inputs(case, seed + other, "cuda"), strict=True):
            held.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        want = rope.rotary_embedding(*call, **case.options)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_warm_touches_no_memory(seed):
    call = cases.make_inputs(CASE, seed, "cuda")
    before = [x.clone() for x in call]
    assert triton_call.warm(*call, **CASE.options)
    assert all(torch.equal(a, b) for a, b in zip(call, before, strict=True))


def test_offsets_past_two_to_the_31():
    tokens, heads = 40000, 512
    query = torch.randn(tokens, heads * 128, device="cuda", dtype=torch.bfloat16)
    assert query.numel() > 2**31
    case = replace(CASE, tokens=0, rotary_dim=128, max_position=tokens)
    cache = cases.make_cache(case, "cuda")
    positions = torch.arange(tokens, device="cuda")
    last = slice(tokens - 64, tokens)
    want, _ = rope.rotary_embedding(positions[last], query[last], None, cache, **case.options)
    got, _ = rope.rotary_embedding(positions, query, None, cache, **case.options)
    assert torch.equal(got[last], want)


@pytest.mark.parametrize("case", cases.correctness_cases()[::7], ids=str)
def test_equals_the_reference_to_a_rounding(case, seed):
    call = cases.make_inputs(case, seed, "cuda")
    _, query, key, _ = call
    got = rope.rotary_embedding(*call, **case.options)
    out = query.new_empty(query.shape), None if key is None else key.new_empty(key.shape)
    reference.rotary_embedding_into(*out, *call, *case.options.values())
    assert_near(got[0], out[0])
    assert key is None or assert_near(got[1], out[1]) is None


@pytest.mark.parametrize("tokens", [1, 63, 128, 129, 30001, 65535, 65536, 150001])
def test_every_number_of_tokens_and_many_runs_agree(tokens, seed):
    """Split, one program a token, and loops. The same bits every time: nothing races."""
    case = replace(CASE, tokens=tokens, query_heads=3, key_heads=1, max_position=4096)
    call = cases.make_inputs(case, seed, "cuda")
    first = rope.rotary_embedding(*call, **case.options)
    want = reference_of(call, case.options)
    assert_near(first[0], want[0])
    assert_near(first[1], want[1])
    for _ in range(10):
        again = rope.rotary_embedding(*call, **case.options)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.slow
def test_the_full_product_of_factors(seed):
    """Style, dtypes, sizes, counts, tokens, strides, positions, sections: rope_product_cuda.py."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join((str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")))
    script = [sys.executable, str(here / "rope_product_cuda.py"), "--seed", str(seed)]
    done = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=580
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

"""Checks of Triton on the software NPU: vllm-ascend's rope, and the interpreter's additions."""

from __future__ import annotations

import os

import numpy
import torch
import torch_npu  # noqa: F401
import vllm_ascend.ops.register_custom_ops  # noqa: F401
import vllm_ascend.ops.rotary_embedding as rotary
import vllm_ascend.ops.triton.triton_utils as release
from softnpu import trace
from softnpu_checks import check, main
from vllm.triton_utils import HAS_TRITON, tl, triton

NPU = torch.device("npu:0")
GENERATOR = numpy.random.default_rng(int(os.environ.get("SEED", "0")))
BASE, POSITIONS, TOKENS = 10000.0, 64, 7
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# What is turned is below 2 * 2**0.5: half a unit in the last place of it, and of the tables' errors
# the most; the same for float32.
LIMITS = {FLOAT32: 5e-7, BFLOAT16: 1.6e-2}

release.init_device_properties_triton()


def drawn(*shape: int, dtype: torch.dtype = FLOAT32) -> tuple[torch.Tensor, numpy.ndarray]:
    """An npu tensor of elements between -2 and 2, and what it holds in float64."""
    cpu = torch.from_numpy(GENERATOR.uniform(-2, 2, shape)).to(dtype)
    return cpu.to(NPU), cpu.double().numpy()


def turned(x: numpy.ndarray, angles: numpy.ndarray, neox: bool) -> numpy.ndarray:
    """[T, H, D] with its first dimensions turned by the angles [T, n]: 2n of them."""
    out, n = x.copy(), angles.shape[-1]
    one, two = (slice(0, n), slice(n, 2 * n)) if neox else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    cos, sin = numpy.cos(angles)[:, None], numpy.sin(angles)[:, None]
    out[..., one] = x[..., one] * cos - x[..., two] * sin
    out[..., two] = x[..., two] * cos + x[..., one] * sin
    return out


def rope_error(rotary_dim: int, head_size: int, neox: bool, dtype: torch.dtype) -> float:
    """How far vllm-ascend's operator is from float64, at most."""
    heads, kv_heads = 3, 1
    exponents = numpy.arange(0, rotary_dim, 2) / rotary_dim
    angles = numpy.arange(POSITIONS)[:, None] / BASE**exponents
    table = numpy.concatenate([numpy.cos(angles), numpy.sin(angles)], -1)
    cache = torch.from_numpy(table).to(NPU, dtype)
    at = GENERATOR.integers(0, POSITIONS, TOKENS)
    (q, right_q), (k, right_k) = (
        drawn(TOKENS, n * head_size, dtype=dtype) for n in (heads, kv_heads)
    )
    found = torch.ops.vllm.npu_rotary_embedding(
        torch.from_numpy(at).to(NPU), q, k, cache, head_size, rotary_dim, neox
    )
    errors = []
    for out, x in zip(found, (right_q, right_k), strict=True):
        assert out.device.type == "npu", out.device
        wanted = turned(x.reshape(TOKENS, -1, head_size), angles[at], neox)
        errors.append(abs(out.cpu().double().numpy().reshape(wanted.shape) - wanted).max())
    return float(max(errors))


@check
def the_release_finds_triton():
    assert HAS_TRITON
    assert rotary.HAS_TRITON
    assert (release.get_aicore_num(), release.get_vectorcore_num()) == (20, 40)


@check
def rope_of_the_release():
    """rotary_dim a power of two: {case: error}."""
    found = {}
    with trace.counted() as calls:
        for rotary_dim, head_size, neox in ((64, 192, True), (128, 128, True), (64, 128, False)):
            for dtype in (FLOAT32, BFLOAT16):
                error = rope_error(rotary_dim, head_size, neox, dtype)
                found[f"{rotary_dim} of {head_size}, neox {neox}, {dtype}"] = error
                assert error <= LIMITS[dtype], found
    kernels = [name for name in calls if name.startswith("triton::_triton_rope")]
    if not os.environ.get("ASCEND_PATCHES"):
        assert sum(calls[name] for name in kernels) == len(found), calls
    return found


@check
def rope_of_192_dimensions():
    """rotary_dim 192 of a head of 192: {dtype: error}, which the test judges."""
    return {str(dtype): rope_error(192, 192, True, dtype) for dtype in (FLOAT32, BFLOAT16)}


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    y = tl.load(y_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, x + y, mask=at < n)
    tl.store(out_ptr + n + at, x * y, mask=at < n)
    tl.store(out_ptr + 2 * n + at, tl.maximum(x, y), mask=at < n)
    tl.store(out_ptr + 3 * n + at, tl.where(x < y, x, y), mask=at < n)
    tl.store(out_ptr + 4 * n + at, tl.exp(x.to(tl.float32)).to(tl.bfloat16), mask=at < n)
    tl.store(out_ptr + 5 * n + at, -x, mask=at < n)


@check
def bfloat16_is_computed_in_float32_and_rounded_once():
    n = 37
    (x, _), (y, _) = drawn(n, dtype=BFLOAT16), drawn(n, dtype=BFLOAT16)
    out = torch.zeros(6, n, dtype=BFLOAT16, device=NPU)
    arithmetic[(1,)](x, y, out, n, SIZE=64)
    a, b = x.cpu(), y.cpu()
    lower = torch.where(a < b, a, b)
    exponential = a.float().exp().bfloat16()
    wanted = torch.stack([a + b, a * b, torch.maximum(a, b), lower, exponential, -a])
    assert torch.equal(out.cpu()[[0, 1, 2, 3, 5]], wanted[[0, 1, 2, 3, 5]])
    # numpy's exponential and PyTorch's may differ in the last bit before they are rounded.
    torch.testing.assert_close(out.cpu()[4], wanted[4], rtol=2**-7, atol=0)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@check
def products_of_bfloat16():
    """The interpreter alone multiplies the integers of the bits."""
    (a, right_a), (b, right_b) = drawn(16, 48, dtype=BFLOAT16), drawn(48, 32, dtype=BFLOAT16)
    out = torch.zeros(16, 32, device=NPU)
    product[(1,)](a, b, out, M=16, N=32, K=48)
    assert abs(out.cpu().double().numpy() - right_a @ right_b).max() < 1e-5


@triton.jit
def slices(x_ptr, out_ptr, last_ptr, extract: tl.constexpr, insert: tl.constexpr,
           element: tl.constexpr):  # fmt: skip
    rows, columns = tl.arange(0, 6), tl.arange(0, 10)
    at = rows[:, None] * 10 + columns[None, :]
    x = tl.load(x_ptr + at)
    part = extract(x, (1, 0), (3, 5), (1, 2))
    tl.store(out_ptr + at, insert(x, part * 2, (3, 5), (3, 5), (1, 1)))
    tl.store(last_ptr, element(x, (5, 9)))


@check
def slices_of_blocks_of_any_size():
    x, right = drawn(6, 10)
    out, last = torch.zeros(6, 10, device=NPU), torch.zeros(1, device=NPU)
    functions = (release.extract_slice, release.insert_slice, release.get_element)
    slices[(1,)](x, out, last, *functions)
    wanted = right.copy()
    wanted[3:6, 5:10] = right[1:4, 0:10:2] * 2
    assert numpy.array_equal(out.cpu().double().numpy(), wanted)
    assert last.item() == right[5, 9]


@triton.jit
def doubled(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) * 2, mask=at < n)


@check
def launches_share_memory_and_are_replayed_in_order():
    base = torch.zeros(20, device=NPU)
    x, y = base[4:14], torch.zeros(10, device=NPU)
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with trace.counted() as calls:
        with torch.npu.graph(graph):
            x.add_(1)
            doubled[(3,)](x, y, 10, SIZE=4)
            y.add_(3)
        for value in (1.0, 5.0):
            base.fill_(value)
            graph.replay()
            assert y.tolist() == [2 * (value + 1) + 3] * 10
            assert base.tolist() == [value] * 4 + [value + 1] * 10 + [value] * 6
        # A launch behind a replay sees what the replay has written.
        base.fill_(7.0)
        graph.replay()
        doubled[(3,)](y, x, 10, SIZE=4)
        assert x.tolist() == [2 * (2 * 8.0 + 3)] * 10
    assert calls["triton::doubled"] == 5, calls
    del graph
    from softnpu.triton import launch

    assert not launch._recorded, "a graph's launches are kept when it is gone"


@check
def memory_of_the_host_is_refused():
    message = ""
    try:
        doubled[(1,)](torch.ones(4), torch.ones(4, device=NPU), 4, SIZE=4)
    except ValueError as error:
        message = str(error)
    assert "kernel doubled got a tensor on cpu" in message, message


if __name__ == "__main__":
    main()

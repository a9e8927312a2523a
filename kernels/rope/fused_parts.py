"""What fused_kernel is made of: heads that are normalised and turned, heads that are copied.

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.triton_parts import turn


@triton.jit
def _scaled(x, scale, weight, bias, at, here, offset, BIAS: tl.constexpr):
    """x scale (weight + offset) + bias, for the elements ``at`` of a head."""
    x = x * scale * (tl.load(weight + at, mask=here, other=0.0).to(tl.float32) + offset)
    if BIAS:
        x += tl.load(bias + at, mask=here, other=0.0).to(tl.float32)
    return x


@triton.jit
def norm_and_turn(
    out,
    x,
    weight,
    bias,
    cos,
    sin,
    eps,
    offset,
    first,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Normalise and turn COUNT of a token's heads, from ``first`` on; out has no gaps."""
    dtype = out.dtype.element_ty
    for done in range(0, COUNT, TILE):
        head = first + done + tl.arange(0, TILE)[:, None]
        r = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        past = r < HEAD_SIZE
        if NEOX:
            j = tl.arange(0, HALF_PAD)[None, :]
            here = (head < HEADS) & (j < HALF)
            a = tl.load(x + head * HEAD_STRIDE + j, mask=here, other=0.0).to(tl.float32)
            b = tl.load(x + head * HEAD_STRIDE + HALF + j, mask=here, other=0.0).to(tl.float32)
            total = tl.sum(a * a + b * b, axis=1)
        else:
            i = tl.arange(0, 2 * HALF_PAD)[None, :]
            here = (head < HEADS) & (i < 2 * HALF)
            pairs = tl.load(x + head * HEAD_STRIDE + i, mask=here, other=0.0).to(tl.float32)
            total = tl.sum(pairs * pairs, axis=1)
        if 2 * HALF < HEAD_SIZE:
            rest = tl.load(x + head * HEAD_STRIDE + r, mask=(head < HEADS) & past, other=0.0)
            rest = rest.to(tl.float32)
            total += tl.sum(rest * rest, axis=1)
        scale = (1.0 / tl.sqrt(total / HEAD_SIZE + eps))[:, None]
        target = out + head * HEAD_SIZE
        if NEOX:
            a = _scaled(a, scale, weight, bias, j, j < HALF, offset, BIAS)
            b = _scaled(b, scale, weight, bias, HALF + j, j < HALF, offset, BIAS)
            a, b = turn(a, b, cos, sin)
            tl.store(target + j, a.to(dtype), mask=here)
            tl.store(target + HALF + j, b.to(dtype), mask=here)
        else:
            pairs = _scaled(pairs, scale, weight, bias, i, i < 2 * HALF, offset, BIAS)
            a, b = tl.split(tl.reshape(pairs, (TILE, HALF_PAD, 2)))
            a, b = turn(a, b, cos, sin)
            tl.store(target + i, tl.interleave(a, b).to(dtype), mask=here)
        if 2 * HALF < HEAD_SIZE:
            rest = _scaled(rest, scale, weight, bias, r, past, offset, BIAS)
            tl.store(target + r, rest.to(dtype), mask=(head < HEADS) & past)


@triton.jit
def copy_heads(
    out,
    x,
    first,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Copy COUNT of a token's heads, from ``first`` on; out has no gaps."""
    for done in range(0, COUNT, TILE):
        head = first + done + tl.arange(0, TILE)[:, None]
        i = tl.arange(0, HEAD_PAD)[None, :]
        here = (head < HEADS) & (i < HEAD_SIZE)
        heads = tl.load(x + head * HEAD_STRIDE + i, mask=here, other=0.0)
        tl.store(out + head * HEAD_SIZE + i, heads, mask=here)

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
def norm_vectors(
    weight,
    bias,
    offset,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Weight + offset and bias in fp32, each for a head's three parts: a, b and what does not turn.

    In GPT-J style, where pairs lie side by side, a stands for both. What is absent is never used.
    """
    if NEOX:
        i = tl.arange(0, HALF_PAD)[None, :]
        here = i < HALF
    else:
        i = tl.arange(0, 2 * HALF_PAD)[None, :]
        here = i < 2 * HALF
    w_a = tl.load(weight + i, mask=here, other=0.0).to(tl.float32) + offset
    w_b = w_a
    w_rest = w_a
    b_a = w_a
    b_b = w_a
    b_rest = w_a
    if BIAS:
        b_a = tl.load(bias + i, mask=here, other=0.0).to(tl.float32)
    if NEOX:
        w_b = tl.load(weight + HALF + i, mask=here, other=0.0).to(tl.float32) + offset
        if BIAS:
            b_b = tl.load(bias + HALF + i, mask=here, other=0.0).to(tl.float32)
    if 2 * HALF < HEAD_SIZE:
        r = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        w_rest = tl.load(weight + r, mask=r < HEAD_SIZE, other=0.0).to(tl.float32) + offset
        if BIAS:
            b_rest = tl.load(bias + r, mask=r < HEAD_SIZE, other=0.0).to(tl.float32)
    return w_a, w_b, w_rest, b_a, b_b, b_rest


@triton.jit
def _scaled(x, scale, weight, bias, BIAS: tl.constexpr):
    x = x * scale * weight
    if BIAS:
        x += bias
    return x


@triton.jit
def norm_and_turn(
    out,
    x,
    weight,
    bias,
    held_w_a,
    held_w_b,
    held_w_rest,
    held_b_a,
    held_b_b,
    held_b_rest,
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
    HELD: tl.constexpr,
):
    """Normalise and turn COUNT of a token's heads, from ``first`` on; out has no gaps.

    With HELD the norm's vectors are the ones given, else each tile reads them.
    """
    dtype = out.dtype.element_ty
    for done in range(0, COUNT, TILE):
        head = first + done + tl.arange(0, TILE)[:, None]
        r = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        past = (head < HEADS) & (r < HEAD_SIZE)
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
            rest = tl.load(x + head * HEAD_STRIDE + r, mask=past, other=0.0).to(tl.float32)
            total += tl.sum(rest * rest, axis=1)
        scale = (1.0 / tl.sqrt(total / HEAD_SIZE + eps))[:, None]
        if HELD:
            w_a, w_b, w_rest = held_w_a, held_w_b, held_w_rest
            b_a, b_b, b_rest = held_b_a, held_b_b, held_b_rest
        else:
            w_a, w_b, w_rest, b_a, b_b, b_rest = norm_vectors(
                weight, bias, offset, HEAD_SIZE, HALF, HALF_PAD, REST_PAD, NEOX, BIAS
            )
        target = out + head * HEAD_SIZE
        if NEOX:
            a = _scaled(a, scale, w_a, b_a, BIAS)
            b = _scaled(b, scale, w_b, b_b, BIAS)
            a, b = turn(a, b, cos, sin)
            tl.store(target + j, a.to(dtype), mask=here)
            tl.store(target + HALF + j, b.to(dtype), mask=here)
        else:
            pairs = _scaled(pairs, scale, w_a, b_a, BIAS)
            a, b = tl.split(tl.reshape(pairs, (TILE, HALF_PAD, 2)))
            a, b = turn(a, b, cos, sin)
            tl.store(target + i, tl.interleave(a, b).to(dtype), mask=here)
        if 2 * HALF < HEAD_SIZE:
            rest = _scaled(rest, scale, w_rest, b_rest, BIAS)
            tl.store(target + r, rest.to(dtype), mask=past)


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

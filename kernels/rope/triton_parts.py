"""What the rotary kernels are made of: a token's angles, and heads turned by them.

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_rows(
    cache, positions, at, rows, cache_stride, axis_stride, token_stride, MROPE: tl.constexpr
):
    """Pointers to the token's rows of the cache: for time, height and width, else thrice the one.

    A position outside the cache is moved to its nearest row, in the dtype that it has.
    """
    here = positions + at * token_stride
    time = tl.minimum(tl.maximum(tl.load(here), 0), rows - 1).to(tl.int64)
    height = time
    width = time
    if MROPE:
        height = tl.load(here + axis_stride)
        height = tl.minimum(tl.maximum(height, 0), rows - 1).to(tl.int64)
        width = tl.load(here + 2 * axis_stride)
        width = tl.minimum(tl.maximum(width, 0), rows - 1).to(tl.int64)
    return cache + time * cache_stride, cache + height * cache_stride, cache + width * cache_stride


@triton.jit
def _row(row, j, HALF: tl.constexpr):
    cos = tl.load(row + j, mask=j < HALF, other=0.0).to(tl.float32)
    sin = tl.load(row + HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def token_angles(
    time_row,
    height_row,
    width_row,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    MROPE: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Cosines and sines [1, HALF_PAD] of a token; what a frequency reads is as in reference.py."""
    j = tl.arange(0, HALF_PAD)[None, :]
    cos, sin = _row(time_row, j, HALF)
    if MROPE:
        # All three rows are read whole and chosen from: a mask with holes would be a gather.
        cos_h, sin_h = _row(height_row, j, HALF)
        cos_w, sin_w = _row(width_row, j, HALF)
        if INTERLEAVED:
            by_height = (j % 3 == 1) & (j < 3 * HEIGHT)
            by_width = (j % 3 == 2) & (j < 3 * WIDTH)
        else:
            by_height = (j >= TIME) & (j < TIME + HEIGHT)
            by_width = j >= TIME + HEIGHT
        cos = tl.where(by_width, cos_w, tl.where(by_height, cos_h, cos))
        sin = tl.where(by_width, sin_w, tl.where(by_height, sin_h, sin))
    return cos, sin


@triton.jit
def turn(a, b, cos, sin):
    """(a cos - b sin, b cos + a sin).

    The fused multiply-adds are spelled out: left to the compiler, which product is fused differs
    from variant to variant, and with it the last bit of an fp32 result.
    """
    return tl.fma(a, cos, b * -sin), tl.fma(b, cos, a * sin)


@triton.jit
def turn_heads(
    out,
    x,
    cos,
    sin,
    first,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    OUT_HEAD_STRIDE: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    COPY_REST: tl.constexpr,
):
    """Turn COUNT of a token's HEADS heads, from ``first`` on, TILE at a time.

    With COPY_REST, the elements of a head that do not turn are copied.
    """
    for done in range(0, COUNT, TILE):
        head = first + done + tl.arange(0, TILE)[:, None]
        if COPY_REST:
            r = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
            past = (head < HEADS) & (r < 2 * HALF + REST)
            rest = tl.load(x + head * HEAD_STRIDE + r, mask=past, other=0.0)
        # All loads come before all stores: in place, a store destroys an input.
        if NEOX:
            j = tl.arange(0, HALF_PAD)[None, :]
            here = (head < HEADS) & (j < HALF)
            source, target = x + head * HEAD_STRIDE + j, out + head * OUT_HEAD_STRIDE + j
            a = tl.load(source, mask=here, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
            a, b = turn(a, b, cos, sin)
            tl.store(target, a.to(out.dtype.element_ty), mask=here)
            tl.store(target + HALF, b.to(out.dtype.element_ty), mask=here)
        else:
            i = tl.arange(0, 2 * HALF_PAD)[None, :]
            here = (head < HEADS) & (i < 2 * HALF)
            pairs = tl.load(x + head * HEAD_STRIDE + i, mask=here, other=0.0)
            a, b = tl.split(tl.reshape(pairs.to(tl.float32), (TILE, HALF_PAD, 2)))
            a, b = turn(a, b, cos, sin)
            target = out + head * OUT_HEAD_STRIDE + i
            tl.store(target, tl.interleave(a, b).to(out.dtype.element_ty), mask=here)
        if COPY_REST:
            tl.store(out + head * OUT_HEAD_STRIDE + r, rest, mask=past)

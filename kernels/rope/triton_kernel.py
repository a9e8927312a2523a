"""Rotary position embedding in Triton: one source for CUDA and for Ascend.

A program takes whole tokens: it reads a token's position as a scalar and its row of cosines and
sines as one run of memory, then turns all heads of query and key by it. Ascend has no fast vector
gather, so no address here depends on a loaded vector; on CUDA the row stays in registers over the
heads. Widths that are no power of two are padded and masked; an offset is never computed from a
padded width.

Importing this module imports triton: ``triton_call`` does it when a kernel first runs.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(cache, positions, rows, stride, j, HALF: tl.constexpr):
    """Cosines and sines [HALF_PAD] of the position that ``positions`` points to."""
    position = tl.load(positions)
    # As the reference does it: the nearest row, in the dtype of the position.
    position = tl.minimum(tl.maximum(position, 0), rows - 1)
    row = cache + position.to(tl.int64) * stride
    cos = tl.load(row + j, mask=j < HALF, other=0.0).to(tl.float32)
    sin = tl.load(row + HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def token_angles(
    cache,
    positions,
    token,
    rows,
    cache_stride,
    axis_stride,
    token_stride,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    MROPE: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The cosines and sines [HALF_PAD] of a token; what a frequency reads is as in reference.py."""
    j = tl.arange(0, HALF_PAD)
    at = positions + token * token_stride
    cos, sin = _row(cache, at, rows, cache_stride, j, HALF)
    if MROPE:
        # All three rows are read whole and chosen from: a mask with holes would be a gather.
        cos_h, sin_h = _row(cache, at + axis_stride, rows, cache_stride, j, HALF)
        cos_w, sin_w = _row(cache, at + 2 * axis_stride, rows, cache_stride, j, HALF)
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
def _turn_heads(
    out,
    x,
    cos,
    sin,
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
    """Turn HEADS heads of one token, TILE at a time; with COPY_REST, copy what does not turn."""
    cos, sin = cos[None, :], sin[None, :]
    for first in range(0, HEADS, TILE):
        head = first + tl.arange(0, TILE)[:, None]
        if NEOX:
            j = tl.arange(0, HALF_PAD)[None, :]
            here = (head < HEADS) & (j < HALF)
            source, target = x + head * HEAD_STRIDE + j, out + head * OUT_HEAD_STRIDE + j
            a = tl.load(source, mask=here, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
            # Both loads come before either store: in place, a store destroys an input.
            tl.store(target, (a * cos - b * sin).to(out.dtype.element_ty), mask=here)
            tl.store(target + HALF, (b * cos + a * sin).to(out.dtype.element_ty), mask=here)
        else:
            i = tl.arange(0, 2 * HALF_PAD)[None, :]
            here = (head < HEADS) & (i < 2 * HALF)
            pairs = tl.load(x + head * HEAD_STRIDE + i, mask=here, other=0.0)
            a, b = tl.split(tl.reshape(pairs.to(tl.float32), (TILE, HALF_PAD, 2)))
            turned = tl.interleave(a * cos - b * sin, b * cos + a * sin)
            target = out + head * OUT_HEAD_STRIDE + i
            tl.store(target, turned.to(out.dtype.element_ty), mask=here)
        if COPY_REST:
            r = tl.arange(0, REST_PAD)[None, :]
            here = (head < HEADS) & (r < REST)
            rest = tl.load(x + head * HEAD_STRIDE + 2 * HALF + r, mask=here, other=0.0)
            tl.store(out + head * OUT_HEAD_STRIDE + 2 * HALF + r, rest, mask=here)


@triton.jit(
    do_not_specialize=["tokens", "rows", "positions_axis_stride", "positions_stride"],
)
def rotary_kernel(
    out_query,
    out_key,
    query,
    key,
    positions,
    cache,
    tokens,
    rows,
    out_query_stride,
    out_key_stride,
    query_stride,
    key_stride,
    positions_axis_stride,
    positions_stride,
    cache_stride,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    KEY_HEAD_STRIDE: tl.constexpr,
    OUT_QUERY_HEAD_STRIDE: tl.constexpr,
    OUT_KEY_HEAD_STRIDE: tl.constexpr,
    REST: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    COPY_REST: tl.constexpr,
    MROPE: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn query and key of all tokens; strides are those of a token, in elements."""
    # Counted in int64: token times stride outgrows int32 in a long prefill.
    for at in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        cos, sin = token_angles(
            cache,
            positions,
            at,
            rows,
            cache_stride,
            positions_axis_stride,
            positions_stride,
            HALF,
            HALF_PAD,
            MROPE,
            TIME,
            HEIGHT,
            WIDTH,
            INTERLEAVED,
        )
        _turn_heads(
            out_query + at * out_query_stride,
            query + at * query_stride,
            cos,
            sin,
            QUERY_HEADS,
            QUERY_TILE,
            QUERY_HEAD_STRIDE,
            OUT_QUERY_HEAD_STRIDE,
            REST,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            COPY_REST,
        )
        if KEY_HEADS > 0:
            _turn_heads(
                out_key + at * out_key_stride,
                key + at * key_stride,
                cos,
                sin,
                KEY_HEADS,
                KEY_TILE,
                KEY_HEAD_STRIDE,
                OUT_KEY_HEAD_STRIDE,
                REST,
                HALF,
                HALF_PAD,
                REST_PAD,
                NEOX,
                COPY_REST,
            )

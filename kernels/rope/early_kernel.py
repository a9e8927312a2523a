"""rotary_kernel for small batches on CUDA: a program loads its heads before it has its position.

A warp issues in order: what stands behind the wait for a position is not under way meanwhile. Each
program takes one tile of heads, of query or of key. Measured against rotary_kernel by
docs/bench/rope_sweep.py; tiles.py decides. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.triton_parts import token_angles, token_rows, turn


@triton.jit(
    do_not_specialize=["tokens", "rows", "positions_axis_stride", "positions_stride"],
)
def early_kernel(
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
    SPLIT: tl.constexpr,
    LOOPS: tl.constexpr,
    SHARED_ROW: tl.constexpr,
):
    """Arguments of rotary_kernel, with tiles of one size, SPLIT and no LOOPS."""
    tl.static_assert(SPLIT)
    tl.static_assert(not LOOPS)
    tl.static_assert(QUERY_TILE == KEY_TILE)
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + QUERY_TILE - 1) // QUERY_TILE
    # In int64: token times stride outgrows int32 in a long prefill.
    at = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if at < tokens:
        head = tl.arange(0, QUERY_TILE)[:, None]
        if tile < QUERY_TILES:
            head += tile * QUERY_TILE
            there = head < QUERY_HEADS
            x = query + at * query_stride + head * QUERY_HEAD_STRIDE
            out = out_query + at * out_query_stride + head * OUT_QUERY_HEAD_STRIDE
        else:
            head += (tile - QUERY_TILES) * KEY_TILE
            there = head < KEY_HEADS
            x = key + at * key_stride + head * KEY_HEAD_STRIDE
            out = out_key + at * out_key_stride + head * OUT_KEY_HEAD_STRIDE
        if NEOX:
            j = tl.arange(0, HALF_PAD)[None, :]
            here = there & (j < HALF)
            a = tl.load(x + j, mask=here, other=0.0)
            b = tl.load(x + HALF + j, mask=here, other=0.0)
        else:
            j = tl.arange(0, 2 * HALF_PAD)[None, :]
            here = there & (j < 2 * HALF)
            pairs = tl.load(x + j, mask=here, other=0.0)
        if COPY_REST:
            r = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
            past = there & (r < 2 * HALF + REST)
            rest = tl.load(x + r, mask=past, other=0.0)
        time_row, height_row, width_row = token_rows(
            cache,
            positions,
            at,
            rows,
            cache_stride,
            positions_axis_stride,
            positions_stride,
            MROPE,
        )
        cos, sin = token_angles(
            time_row,
            height_row,
            width_row,
            HALF,
            HALF_PAD,
            MROPE,
            TIME,
            HEIGHT,
            WIDTH,
            INTERLEAVED,
        )
        dtype = out_query.dtype.element_ty
        if NEOX:
            a, b = turn(a.to(tl.float32), b.to(tl.float32), cos, sin)
            tl.store(out + j, a.to(dtype), mask=here)
            tl.store(out + HALF + j, b.to(dtype), mask=here)
        else:
            pairs = tl.reshape(pairs.to(tl.float32), (QUERY_TILE, HALF_PAD, 2))
            a, b = tl.split(pairs)
            a, b = turn(a, b, cos, sin)
            tl.store(out + j, tl.interleave(a, b).to(dtype), mask=here)
        if COPY_REST:
            tl.store(out + r, rest, mask=past)

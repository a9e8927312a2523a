"""Rotary position embedding in Triton: one source for CUDA and for Ascend.

A program takes whole tokens: it reads a token's position as a scalar and its row of cosines and
sines as one run of memory, then turns all heads of query and key by it. Ascend has no fast vector
gather, so no address here depends on a loaded vector. Widths that are no power of two are padded
and masked; an offset is never computed from a padded width.

What differs between the two are constants: on Ascend a fixed grid of programs loops over the tokens
and keeps the row for query and key; on CUDA a program ends with its token, where a batch is small
even with a tile of its heads, and reads the row again for key (measured: docs/bench/rope.md).

Importing this module imports triton: ``triton_call`` does it when a kernel first runs.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.triton_parts import token_angles, token_rows, turn_heads


@triton.jit
def _turn_token(
    at,
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
    """Turn the heads of token ``at``: all of them, or with SPLIT those of this program's tile."""
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
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + QUERY_TILE - 1) // QUERY_TILE
    QUERY_COUNT: tl.constexpr = QUERY_TILE if SPLIT else QUERY_HEADS
    KEY_COUNT: tl.constexpr = KEY_TILE if SPLIT else KEY_HEADS
    tile = tl.program_id(1) if SPLIT else 0
    if (not SPLIT) or tile < QUERY_TILES:
        turn_heads(
            out_query + at * out_query_stride,
            query + at * query_stride,
            cos,
            sin,
            tile * QUERY_TILE,
            QUERY_COUNT,
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
    if KEY_HEADS > 0 and ((not SPLIT) or tile >= QUERY_TILES):
        if not (SHARED_ROW or SPLIT):
            # A second read, out of the cache, costs less than a new layout in registers.
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
        first = (tile - QUERY_TILES) * KEY_TILE if SPLIT else 0
        turn_heads(
            out_key + at * out_key_stride,
            key + at * key_stride,
            cos,
            sin,
            first,
            KEY_COUNT,
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
    SPLIT: tl.constexpr,
    LOOPS: tl.constexpr,
    SHARED_ROW: tl.constexpr,
):
    """Turn query and key of all tokens; strides are those of a token, in elements.

    Tokens go over axis 0 of the grid: one a program, or with LOOPS a program takes every n-th.
    With SPLIT, axis 1 of the grid goes over the tiles of heads, query's and then key's.
    """
    # In int64: token times stride outgrows int32 in a long prefill.
    at = tl.program_id(0).to(tl.int64)
    if LOOPS:
        for token in range(at, tokens, tl.num_programs(0)):
            _turn_token(
                token,
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
                QUERY_HEADS,
                KEY_HEADS,
                QUERY_TILE,
                KEY_TILE,
                QUERY_HEAD_STRIDE,
                KEY_HEAD_STRIDE,
                OUT_QUERY_HEAD_STRIDE,
                OUT_KEY_HEAD_STRIDE,
                REST,
                HALF,
                HALF_PAD,
                REST_PAD,
                NEOX,
                COPY_REST,
                MROPE,
                TIME,
                HEIGHT,
                WIDTH,
                INTERLEAVED,
                SPLIT,
                LOOPS,
                SHARED_ROW,
            )
    elif at < tokens:
        _turn_token(
            at,
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
            QUERY_HEADS,
            KEY_HEADS,
            QUERY_TILE,
            KEY_TILE,
            QUERY_HEAD_STRIDE,
            KEY_HEAD_STRIDE,
            OUT_QUERY_HEAD_STRIDE,
            OUT_KEY_HEAD_STRIDE,
            REST,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            COPY_REST,
            MROPE,
            TIME,
            HEIGHT,
            WIDTH,
            INTERLEAVED,
            SPLIT,
            LOOPS,
            SHARED_ROW,
        )

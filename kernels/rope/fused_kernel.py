"""split_qkv_rmsnorm_rope in Triton: one source for CUDA and for Ascend, built as rotary_kernel is.

A program reads each head once: its sum of squares, its scale and its rotation come from the same
registers. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.fused_parts import copy_heads, norm_and_turn
from ascend_patch.kernels.rope.triton_parts import token_angles, token_rows


@triton.jit
def _one_token(
    at,
    out_query,
    out_key,
    out_value,
    out_gate,
    qkv,
    positions,
    cache,
    query_weight,
    key_weight,
    query_bias,
    key_bias,
    tokens,
    rows,
    qkv_stride,
    positions_axis_stride,
    positions_stride,
    cache_stride,
    eps,
    weight_offset,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    MROPE: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """Token ``at``: all of its heads, or with SPLIT those of this program's tile."""
    time_row, height_row, width_row = token_rows(
        cache, positions, at, rows, cache_stride, positions_axis_stride, positions_stride, MROPE
    )
    cos, sin = token_angles(
        time_row, height_row, width_row, HALF, HALF_PAD, MROPE, TIME, HEIGHT, WIDTH, INTERLEAVED
    )
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + QUERY_TILE - 1) // QUERY_TILE
    QUERY_STRIDE: tl.constexpr = HEAD_SIZE * (2 if GATE else 1)
    KEY_SIZE: tl.constexpr = KEY_HEADS * HEAD_SIZE
    tile = tl.program_id(1) if SPLIT else 0
    x = qkv + at * qkv_stride
    if (not SPLIT) or tile < QUERY_TILES:
        first = tile * QUERY_TILE
        to = at * (QUERY_HEADS * HEAD_SIZE)
        norm_and_turn(
            out_query + to,
            x,
            query_weight,
            query_bias,
            cos,
            sin,
            eps,
            weight_offset,
            first,
            QUERY_TILE if SPLIT else QUERY_HEADS,
            QUERY_HEADS,
            QUERY_TILE,
            QUERY_STRIDE,
            HEAD_SIZE,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            BIAS,
        )
        if GATE:
            copy_heads(
                out_gate + to,
                x + HEAD_SIZE,
                first,
                QUERY_TILE if SPLIT else QUERY_HEADS,
                QUERY_HEADS,
                QUERY_TILE,
                QUERY_STRIDE,
                HEAD_SIZE,
                HEAD_PAD,
            )
    if (not SPLIT) or tile >= QUERY_TILES:
        first = (tile - QUERY_TILES) * KEY_TILE if SPLIT else 0
        to = at * KEY_SIZE
        x += QUERY_HEADS * QUERY_STRIDE
        norm_and_turn(
            out_key + to,
            x,
            key_weight,
            key_bias,
            cos,
            sin,
            eps,
            weight_offset,
            first,
            KEY_TILE if SPLIT else KEY_HEADS,
            KEY_HEADS,
            KEY_TILE,
            HEAD_SIZE,
            HEAD_SIZE,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            BIAS,
        )
        copy_heads(
            out_value + to,
            x + KEY_SIZE,
            first,
            KEY_TILE if SPLIT else KEY_HEADS,
            KEY_HEADS,
            KEY_TILE,
            HEAD_SIZE,
            HEAD_SIZE,
            HEAD_PAD,
        )


@triton.jit(
    do_not_specialize=["tokens", "rows", "positions_axis_stride", "positions_stride"],
)
def fused_kernel(
    out_query,
    out_key,
    out_value,
    out_gate,
    qkv,
    positions,
    cache,
    query_weight,
    key_weight,
    query_bias,
    key_bias,
    tokens,
    rows,
    qkv_stride,
    positions_axis_stride,
    positions_stride,
    cache_stride,
    eps,
    weight_offset,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    MROPE: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLIT: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """All tokens; SPLIT and LOOPS are as in rotary_kernel, outputs are contiguous."""
    # In int64: token times stride outgrows int32 in a long prefill.
    at = tl.program_id(0).to(tl.int64)
    if LOOPS:
        for token in range(at, tokens, tl.num_programs(0)):
            _one_token(
                token,
                out_query,
                out_key,
                out_value,
                out_gate,
                qkv,
                positions,
                cache,
                query_weight,
                key_weight,
                query_bias,
                key_bias,
                tokens,
                rows,
                qkv_stride,
                positions_axis_stride,
                positions_stride,
                cache_stride,
                eps,
                weight_offset,
                QUERY_HEADS,
                KEY_HEADS,
                QUERY_TILE,
                KEY_TILE,
                HEAD_SIZE,
                HEAD_PAD,
                HALF,
                HALF_PAD,
                REST_PAD,
                NEOX,
                GATE,
                BIAS,
                MROPE,
                TIME,
                HEIGHT,
                WIDTH,
                INTERLEAVED,
                SPLIT,
                LOOPS,
            )
    elif at < tokens:
        _one_token(
            at,
            out_query,
            out_key,
            out_value,
            out_gate,
            qkv,
            positions,
            cache,
            query_weight,
            key_weight,
            query_bias,
            key_bias,
            tokens,
            rows,
            qkv_stride,
            positions_axis_stride,
            positions_stride,
            cache_stride,
            eps,
            weight_offset,
            QUERY_HEADS,
            KEY_HEADS,
            QUERY_TILE,
            KEY_TILE,
            HEAD_SIZE,
            HEAD_PAD,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            GATE,
            BIAS,
            MROPE,
            TIME,
            HEIGHT,
            WIDTH,
            INTERLEAVED,
            SPLIT,
            LOOPS,
        )

"""One token of fused_kernel. Importing this module imports triton."""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.fused_parts import copy_heads, norm_and_turn
from ascend_patch.kernels.rope.triton_parts import token_angles, token_rows


@triton.jit
def fused_token(
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
    q_w_a,
    q_w_b,
    q_w_rest,
    q_b_a,
    q_b_b,
    q_b_rest,
    k_w_a,
    k_w_b,
    k_w_rest,
    k_b_a,
    k_b_b,
    k_b_rest,
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
            q_w_a,
            q_w_b,
            q_w_rest,
            q_b_a,
            q_b_b,
            q_b_rest,
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
            LOOPS,
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
            k_w_a,
            k_w_b,
            k_w_rest,
            k_b_a,
            k_b_b,
            k_b_rest,
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
            LOOPS,
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

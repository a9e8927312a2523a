"""split_qkv_rmsnorm_rope in Triton: one source for CUDA and for Ascend, built as rotary_kernel is.

A program reads each head once: its sum of squares, its scale and its rotation come from the same
registers. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.fused_parts import norm_vectors
from ascend_patch.kernels.rope.fused_token import fused_token


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
        # Read once by a program; elsewhere caches serve all programs but the first.
        q_w_a, q_w_b, q_w_rest, q_b_a, q_b_b, q_b_rest = norm_vectors(
            query_weight,
            query_bias,
            weight_offset,
            HEAD_SIZE,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            BIAS,
        )
        k_w_a, k_w_b, k_w_rest, k_b_a, k_b_b, k_b_rest = norm_vectors(
            key_weight, key_bias, weight_offset, HEAD_SIZE, HALF, HALF_PAD, REST_PAD, NEOX, BIAS
        )
        for token in range(at, tokens, tl.num_programs(0)):
            fused_token(
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
        fused_token(
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
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
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

"""apply_rotary in Triton: one source for CUDA and for Ascend, built as rotary_kernel is.

The angles are given for each place in a sequence instead of looked up by a position. Importing this
module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.triton_parts import turn_heads


@triton.jit
def _turn_place(
    at,
    out,
    x,
    cos,
    sin,
    places,
    x_batch_stride,
    x_stride,
    cos_batch_stride,
    cos_stride,
    sin_batch_stride,
    sin_stride,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Turn the heads at one place of one batch entry; with SPLIT, those of this program's tile."""
    entry = at // places
    place = at - entry * places
    j = tl.arange(0, HALF_PAD)[None, :]
    cos += entry * cos_batch_stride + place * cos_stride
    sin += entry * sin_batch_stride + place * sin_stride
    c = tl.load(cos + j, mask=j < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + j, mask=j < HALF, other=0.0).to(tl.float32)
    turn_heads(
        out + at * (HEADS * HEAD_SIZE),
        x + entry * x_batch_stride + place * x_stride,
        c,
        s,
        (tl.program_id(1) if SPLIT else 0) * TILE,
        TILE if SPLIT else HEADS,
        HEADS,
        TILE,
        HEAD_STRIDE,
        HEAD_SIZE,
        HEAD_SIZE - 2 * HALF,
        HALF,
        HALF_PAD,
        REST_PAD,
        NEOX,
        2 * HALF < HEAD_SIZE,
    )


@triton.jit(
    do_not_specialize=[
        "places",
        "tokens",
        "x_batch_stride",
        "cos_batch_stride",
        "sin_batch_stride",
    ],
)
def angles_kernel(
    out,
    x,
    cos,
    sin,
    places,
    tokens,
    x_batch_stride,
    x_stride,
    cos_batch_stride,
    cos_stride,
    sin_batch_stride,
    sin_stride,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    NEOX: tl.constexpr,
    SPLIT: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """All ``tokens`` = batch entries x places; SPLIT and LOOPS are as in rotary_kernel."""
    # In int64: token times stride outgrows int32.
    at = tl.program_id(0).to(tl.int64)
    if LOOPS:
        for token in range(at, tokens, tl.num_programs(0)):
            _turn_place(
                token,
                out,
                x,
                cos,
                sin,
                places,
                x_batch_stride,
                x_stride,
                cos_batch_stride,
                cos_stride,
                sin_batch_stride,
                sin_stride,
                HEADS,
                TILE,
                HEAD_STRIDE,
                HEAD_SIZE,
                HALF,
                HALF_PAD,
                REST_PAD,
                NEOX,
                SPLIT,
            )
    elif at < tokens:
        _turn_place(
            at,
            out,
            x,
            cos,
            sin,
            places,
            x_batch_stride,
            x_stride,
            cos_batch_stride,
            cos_stride,
            sin_batch_stride,
            sin_stride,
            HEADS,
            TILE,
            HEAD_STRIDE,
            HEAD_SIZE,
            HALF,
            HALF_PAD,
            REST_PAD,
            NEOX,
            SPLIT,
        )

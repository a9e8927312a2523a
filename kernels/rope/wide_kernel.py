"""fused_kernel for CUDA where less than a whole head turns, in NeoX style.

A head is one run of blocks, and each element finds its partner by a second load, which the first
one's cache line serves: one layout for the sum of squares, the rotation and what does not turn, and
no lanes idle behind a half of 48. Measured against fused_kernel by docs/bench/rope_sweep.py;
tiles.py decides. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.rope.fused_parts import copy_heads
from ascend_patch.kernels.rope.triton_parts import token_rows


@triton.jit
def _wide_heads(
    out,
    x,
    row,
    weight,
    bias,
    eps,
    offset,
    first,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Normalise and turn COUNT of a token's heads, from ``first`` on; out has no gaps."""
    TURNING: tl.constexpr = HALF // BLOCK
    g = tl.arange(0, HEAD_PAD // BLOCK)[None, :, None]
    j = tl.arange(0, BLOCK)[None, None, :]
    inside = g < HEAD_SIZE // BLOCK
    turns = g < 2 * TURNING
    other = tl.where(g < TURNING, g + TURNING, tl.where(turns, g - TURNING, g))
    angle = tl.where(g < TURNING, g, g - TURNING) * BLOCK + j
    mine = g * BLOCK + j
    its = other * BLOCK + j
    cos = tl.load(row + angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(row + HALF + angle, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(g < TURNING, -sin, sin)
    for done in range(0, COUNT, TILE):
        head = first + done + tl.arange(0, TILE)[:, None, None]
        here = (head < HEADS) & inside
        a = tl.load(x + head * HEAD_STRIDE + mine, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + head * HEAD_STRIDE + its, mask=here, other=0.0).to(tl.float32)
        total = tl.sum(tl.sum(a * a, axis=2), axis=1)
        scale = (1.0 / tl.sqrt(total / HEAD_SIZE + eps))[:, None, None]
        a = a * scale * (tl.load(weight + mine, mask=inside, other=0.0).to(tl.float32) + offset)
        b = b * scale * (tl.load(weight + its, mask=inside, other=0.0).to(tl.float32) + offset)
        if BIAS:
            a += tl.load(bias + mine, mask=inside, other=0.0).to(tl.float32)
            b += tl.load(bias + its, mask=inside, other=0.0).to(tl.float32)
        turned = tl.where(turns, tl.fma(a, cos, b * sin), a)
        tl.store(out + head * HEAD_SIZE + mine, turned.to(out.dtype.element_ty), mask=here)


@triton.jit(
    do_not_specialize=["tokens", "rows", "positions_axis_stride", "positions_stride"],
)
def wide_kernel(
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
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Arguments of fused_kernel, as far as they matter here; a program takes a token or a tile."""
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + QUERY_TILE - 1) // QUERY_TILE
    QUERY_STRIDE: tl.constexpr = HEAD_SIZE * (2 if GATE else 1)
    KEY_SIZE: tl.constexpr = KEY_HEADS * HEAD_SIZE
    # In int64: token times stride outgrows int32 in a long prefill.
    at = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) if SPLIT else 0
    if at < tokens:
        row, _height, _width = token_rows(
            cache, positions, at, rows, cache_stride, positions_axis_stride, positions_stride, False
        )
        x = qkv + at * qkv_stride
        if (not SPLIT) or tile < QUERY_TILES:
            first = tile * QUERY_TILE
            to = at * (QUERY_HEADS * HEAD_SIZE)
            _wide_heads(
                out_query + to,
                x,
                row,
                query_weight,
                query_bias,
                eps,
                weight_offset,
                first,
                QUERY_TILE if SPLIT else QUERY_HEADS,
                QUERY_HEADS,
                QUERY_TILE,
                QUERY_STRIDE,
                HEAD_SIZE,
                HEAD_PAD,
                HALF,
                BLOCK,
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
            x += QUERY_HEADS * QUERY_STRIDE
            _wide_heads(
                out_key + at * KEY_SIZE,
                x,
                row,
                key_weight,
                key_bias,
                eps,
                weight_offset,
                first,
                KEY_TILE if SPLIT else KEY_HEADS,
                KEY_HEADS,
                KEY_TILE,
                HEAD_SIZE,
                HEAD_SIZE,
                HEAD_PAD,
                HALF,
                BLOCK,
                BIAS,
            )
            copy_heads(
                out_value + at * KEY_SIZE,
                x + KEY_SIZE,
                first,
                KEY_TILE if SPLIT else KEY_HEADS,
                KEY_HEADS,
                KEY_TILE,
                HEAD_SIZE,
                HEAD_SIZE,
                HEAD_PAD,
            )

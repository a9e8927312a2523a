"""gated_rms_norm in Triton: one source for CUDA and for Ascend.

A program takes tiles of rows that lie at one stride from each other, of one group of columns.
Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.conv_parts import silu


@triton.jit(do_not_specialize=["items", "rows"])
def gated_norm_kernel(
    x,
    gate,
    weight,
    out,
    items,
    tiles,
    rows,
    x_outer,
    x_stride,
    gate_outer,
    gate_stride,
    out_outer,
    out_stride,
    eps,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
    GATE: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """Every n-th of ``items``: tiles of TILE of ``rows`` rows, and GROUPS groups of columns each.

    x, gate and out [outer, rows, GROUPS * GROUP] with two strides; weight [GROUPS * GROUP]. GATE:
    there is one; BEFORE: it comes after the norm.
    """
    columns = tl.arange(0, PAD)
    known = columns < GROUP
    row = tl.arange(0, TILE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        group = item % GROUPS * GROUP
        tile = item // GROUPS % tiles
        first = tl.full((), tile * TILE, tl.int64)
        outer = tl.full((), item // GROUPS // tiles, tl.int64)
        valid = (first + row < rows)[:, None] & known[None, :]
        # In int64: rows times their stride outgrow int32; within a tile they do not.
        x_at = x + outer * x_outer + first * x_stride + group
        values = tl.load(x_at + row[:, None] * x_stride + columns[None, :], mask=valid, other=0.0)
        values = values.to(tl.float32)
        if GATE:
            gate_at = gate + outer * gate_outer + first * gate_stride + group
            gates = tl.load(
                gate_at + row[:, None] * gate_stride + columns[None, :], mask=valid, other=0.0
            )
            factor = silu(gates.to(tl.float32))
            if not BEFORE:
                values *= factor
        scale = tl.rsqrt(tl.sum(values * values, 1) / GROUP + eps)
        weights = tl.load(weight + group + columns, mask=known, other=0.0).to(tl.float32)
        values = values * scale[:, None] * weights[None, :]
        if GATE and BEFORE:
            values *= factor
        out_at = out + outer * out_outer + first * out_stride + group
        tl.store(
            out_at + row[:, None] * out_stride + columns[None, :],
            values.to(out.dtype.element_ty),
            mask=valid,
        )

"""A decode step of the gated delta rule in Triton: one source for CUDA and for Ascend.

A program takes a part of a value head's state, some of its V columns whole, since columns do not
meet. A tile keeps the order that the state has in memory, so that its last axis is contiguous.
Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.recurrent_token import past_token


@triton.jit
def _part(
    item,
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    o,
    cache,
    state_indices,
    cu_seqlens,
    accepted,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    o_stride,
    slot_stride,
    request_stride,
    column_stride,
    width,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    VK: tl.constexpr,
    RAW: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    ACCEPTED: tl.constexpr,
):
    """Part ``item`` of V / COLUMNS, of a value head, of a request; parts vary fastest."""
    AXIS_K: tl.constexpr = 1 if VK else 0
    part = item % (V // COLUMNS)
    head = item // (V // COLUMNS) % HV
    request = item // (V // COLUMNS * HV)
    start = request.to(tl.int64)
    length = 1
    if SEQUENCES:
        start = tl.load(cu_seqlens + request).to(tl.int64)
        length = (tl.load(cu_seqlens + request + 1) - start).to(tl.int32)
    slots = state_indices + request.to(tl.int64) * request_stride
    begin = slots
    if ACCEPTED:
        column = tl.load(accepted + request).to(tl.int32) - 1
        # Inside the row, whatever the caller says.
        column = tl.minimum(tl.maximum(column, 0), width - 1)
        begin = slots + column * column_stride
    slot = tl.load(begin).to(tl.int64)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, K)
    place = tl.expand_dims(rows, 1 - AXIS_K) * (1 if VK else V)
    place += tl.expand_dims(columns, AXIS_K) * (K if VK else 1) + head * (K * V)
    if (slot >= 0) & (length > 0):
        state = tl.load(cache + slot * slot_stride + place).to(tl.float32)
        for position in range(length):
            state = past_token(
                state,
                start + position,
                head,
                columns,
                q,
                k,
                v,
                g,
                beta,
                A_log,
                dt_bias,
                o,
                q_stride,
                k_stride,
                v_stride,
                g_stride,
                beta_stride,
                o_stride,
                scale,
                H,
                HV,
                K,
                V,
                VK,
                RAW,
                NORMALISE,
                EPS,
            )
            if SPECULATIVE:
                at = slots + position * column_stride
                into = tl.load(at, mask=position < width, other=-1).to(tl.int64)
                if into >= 0:
                    tl.store(cache + into * slot_stride + place, state.to(cache.dtype.element_ty))
        if not SPECULATIVE:
            tl.store(cache + slot * slot_stride + place, state.to(cache.dtype.element_ty))
    else:
        nothing = tl.zeros([COLUMNS], dtype=o.dtype.element_ty)
        for position in range(length):
            tl.store(o + (start + position) * o_stride + head * V + columns, nothing)


@triton.jit(do_not_specialize=["items", "width"])
def recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    o,
    cache,
    state_indices,
    cu_seqlens,
    accepted,
    items,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    o_stride,
    slot_stride,
    request_stride,
    column_stride,
    width,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    VK: tl.constexpr,
    RAW: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    ACCEPTED: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """A step: q, k [T, H, K], v, o [T, HV, V], g and beta [T, HV], or a and b with RAW.

    cache: states, a slot at its number times slot_stride. state_indices: [N], or with SPECULATIVE
    [N, width]; ``accepted`` [N] with ACCEPTED, ``cu_seqlens`` [N + 1] with SEQUENCES. A program
    takes item after item with LOOPS, else the one of its number.
    """
    if LOOPS:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            _part(
                item,
                q,
                k,
                v,
                g,
                beta,
                A_log,
                dt_bias,
                o,
                cache,
                state_indices,
                cu_seqlens,
                accepted,
                q_stride,
                k_stride,
                v_stride,
                g_stride,
                beta_stride,
                o_stride,
                slot_stride,
                request_stride,
                column_stride,
                width,
                scale,
                H,
                HV,
                K,
                V,
                COLUMNS,
                VK,
                RAW,
                NORMALISE,
                EPS,
                SEQUENCES,
                SPECULATIVE,
                ACCEPTED,
            )
    else:
        _part(
            tl.program_id(0),
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            o,
            cache,
            state_indices,
            cu_seqlens,
            accepted,
            q_stride,
            k_stride,
            v_stride,
            g_stride,
            beta_stride,
            o_stride,
            slot_stride,
            request_stride,
            column_stride,
            width,
            scale,
            H,
            HV,
            K,
            V,
            COLUMNS,
            VK,
            RAW,
            NORMALISE,
            EPS,
            SEQUENCES,
            SPECULATIVE,
            ACCEPTED,
        )

"""The state of each sequence carried through its chunks, and every chunk's output, in Triton.

With S [K, V] before a chunk and prepare_kernel's u, w and p:

    r = u - w S,    o = scale exp(G) q S + p r,    S' = exp(G_last) S + (exp(G_last - G) k)^T r.

Columns of S do not meet, so a program has some of them. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.state_parts import first_state, slot_of


@triton.jit
def scan_kernel(
    q,
    k,
    w,
    u,
    p,
    decays,
    lengths_q,
    lengths_k,
    initial,
    final,
    state_indices,
    has_initial_state,
    o,
    cu_seqlens,
    q_stride,
    k_stride,
    o_stride,
    initial_stride,
    final_stride,
    indices_stride,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    STATE_K: tl.constexpr,
    STATE_V: tl.constexpr,
    INDEXED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """COLUMNS of the state of one value head of one sequence.

    initial, final: states, a sequence's at its number times the stride, or with INDEXED at that of
    its slot; an element [k, v] of a head at k * STATE_K + v * STATE_V. A slot below 0 has no
    state: it is neither read nor written.
    """
    part = tl.program_id(0)
    sequence = tl.program_id(1) // HV
    head = tl.program_id(1) % HV
    key_head = head // (HV // H)
    start = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    i = tl.arange(0, CHUNK)
    rows = tl.arange(0, K)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)

    slot = slot_of(state_indices, sequence, indices_stride, INDEXED)
    place = head * K * V + rows[:, None] * STATE_K + columns[None, :] * STATE_V
    state = first_state(
        initial, has_initial_state, sequence, slot, place, initial_stride, K, COLUMNS, INDEXED,
        INITIAL,
    )  # fmt: skip

    for first in range(start, end, CHUNK):
        valid = first + i < end
        # In int64: tokens times heads times their size outgrow int32.
        at = (first + i).to(tl.int64)
        w_at = w + (at[:, None] * HV + head) * K + rows[None, :]
        u_at = u + (at[:, None] * HV + head) * V + columns[None, :]
        p_at = p + (at[:, None] * HV + head) * CHUNK + i[None, :]
        k_at = k + at[:, None] * k_stride + key_head * K + rows[None, :]
        q_at = q + at[:, None] * q_stride + key_head * K + rows[None, :]
        rows_w = tl.load(w_at, mask=valid[:, None], other=0.0)
        rows_q = tl.load(q_at, mask=valid[:, None], other=0.0)
        rows_k = tl.load(k_at, mask=valid[:, None], other=0.0)
        scores = tl.load(p_at, mask=valid[:, None], other=0.0)
        written = tl.load(u_at, mask=valid[:, None], other=0.0).to(tl.float32)
        total = tl.load(decays + at * HV + head, mask=valid, other=0.0)
        # Not loaded: one element's load is not masked, and loads run ahead of the loop's end.
        last = tl.sum(tl.where(i == tl.minimum(CHUNK, end - first) - 1, total, 0.0), 0)
        read = scale * tl.exp(total)
        left = tl.where(valid, tl.exp(last - total), 0.0)
        if NORMALISE:
            read *= tl.load(lengths_q + at * H + key_head, mask=valid, other=0.0)
            left *= tl.load(lengths_k + at * H + key_head, mask=valid, other=0.0)
        kind = rows_w.dtype

        before = state.to(kind)
        written -= tl.dot(rows_w, before)
        out = tl.dot(rows_q, before) * read[:, None]
        out += tl.dot(scores, written.to(kind))
        o_at = o + at[:, None] * o_stride + head * V + columns[None, :]
        tl.store(o_at, out.to(o.dtype.element_ty), mask=valid[:, None])
        state *= tl.exp(last)
        state += tl.dot(tl.trans(rows_k), (written * left[:, None]).to(kind))

    if FINAL:
        tl.store(
            final + slot * final_stride + place, state.to(final.dtype.element_ty), mask=slot >= 0
        )

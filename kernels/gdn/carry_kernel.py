"""The state of each sequence carried through its chunks, and nothing else, in Triton.

With S [K, V] before a chunk and prepare_kernel's u and w:

    r = u - w S,    S' = exp(G_last) S + (exp(G_last - G) k)^T r.

Each chunk waits for the one before it, so what can be done behind, output_kernel does: for all
chunks at once. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.state_parts import first_state, slot_of


@triton.jit(do_not_specialize=("tokens",))
def carry_kernel(
    k,
    w,
    u,
    left,
    lasts,
    states,
    initial,
    final,
    state_indices,
    has_initial_state,
    cu_seqlens,
    chunk_offsets,
    k_stride,
    initial_stride,
    final_stride,
    indices_stride,
    tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATE_K: tl.constexpr,
    STATE_V: tl.constexpr,
    INDEXED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """COLUMNS of the state of one value head of one sequence; r takes u's place [T, HV, V].

    states [C, HV, K, V]: the state before each chunk, in k's dtype. initial, final: states, a
    sequence's at its number times the stride, or with INDEXED at that of its slot; an element
    [k, v] of a head at k * STATE_K + v * STATE_V. A slot below 0 has no state: it is neither read
    nor written.
    """
    part = tl.program_id(0)
    sequence = tl.program_id(1) // HV
    head = tl.program_id(1) % HV
    key_head = head // (HV // H)
    start = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1)
    chunk = tl.load(chunk_offsets + sequence).to(tl.int64)
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
        u_at = u + (at[:, None] * HV + head) * V + columns[None, :]
        rows_w = tl.load(
            w + (at[:, None] * HV + head) * K + rows[None, :], mask=valid[:, None], other=0.0
        )
        rows_k = tl.load(
            k + at[:, None] * k_stride + key_head * K + rows[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        written = tl.load(u_at, mask=valid[:, None], other=0.0).to(tl.float32)
        rest = tl.load(left + head.to(tl.int64) * tokens + at, mask=valid, other=0.0)
        last = tl.load(lasts + chunk * HV + head)
        kind = rows_w.dtype

        before = state.to(kind)
        tl.store(
            states + (chunk * HV + head) * (K * V) + rows[:, None] * V + columns[None, :], before
        )
        written -= tl.dot(rows_w, before)
        tl.store(u_at, written.to(kind), mask=valid[:, None])
        state *= last
        state += tl.dot(tl.trans(rows_k), (written * rest[:, None]).to(kind))
        chunk += 1

    if FINAL:
        tl.store(
            final + slot * final_stride + place, state.to(final.dtype.element_ty), mask=slot >= 0
        )

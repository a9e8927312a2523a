"""scan_kernel's work as an Ascend core can do it: the state of each sequence through its chunks.

The formulas are scan_kernel's. What the compiler of Ascend makes different: a fixed grid loops over
sequences, heads and parts of a state; a state is read and written in the order in which it lies,
and turned in the unified buffer; decays and lengths have a head's tokens side by side; and rows
behind the last token are masked before they meet another product (see ascend_prepare_kernel).

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


# A batch's size is no reason to compile again.
@triton.jit(do_not_specialize=["tokens", "items"])
def scan_loop(
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
    tokens,
    items,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    KV: tl.constexpr,
    INDEXED: tl.constexpr,
    CARRIED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Every n-th of ``items``: COLUMNS of the state of one value head of one sequence.

    initial, final: states [.., HV, K, V] with KV, else [.., HV, V, K]; a sequence's at its number
    times the stride, or with INDEXED at that of its slot, which state_indices [N] names. A slot
    below 0 has no state: it is neither read nor written. has_initial_state [N] counts with CARRIED.
    """
    i = tl.arange(0, CHUNK)
    rows = tl.arange(0, K)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        part = item % (V // COLUMNS)
        head = item // (V // COLUMNS) % HV
        sequence = item // (V // COLUMNS * HV)
        key_head = head // (HV // H)
        start = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
        columns = part * COLUMNS + tl.arange(0, COLUMNS)
        # In int64: tokens times heads times their size outgrow int32.
        row_of_head = head.to(tl.int64) * tokens
        row_of_key = key_head.to(tl.int64) * tokens

        slot = sequence.to(tl.int64)
        if INDEXED:
            slot = tl.load(state_indices + sequence * indices_stride).to(tl.int64)
        kept = slot >= 0
        # Masked or not, an address is one of the cache.
        slot = tl.maximum(slot, 0)
        if KV:
            place = head * K * V + rows[:, None] * V + columns[None, :]
        else:
            place = head * K * V + columns[:, None] * K + rows[None, :]
        state = tl.zeros([K, COLUMNS], dtype=tl.float32)
        if INITIAL:
            wanted = kept
            if CARRIED:
                wanted = kept & (tl.load(has_initial_state + sequence) != 0)
            held = tl.load(initial + slot * initial_stride + place, mask=wanted, other=0.0)
            if KV:
                state += held.to(tl.float32)
            else:
                state += tl.trans(held.to(tl.float32))

        for first in range(start, end, CHUNK):
            valid = first + i < end
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
            total = tl.load(decays + row_of_head + at, mask=valid, other=0.0)
            # Loaded on its own: a sum over the rows would keep the compiler from giving each of the
            # two vector cores half of them.
            last_at = tl.minimum(first + CHUNK, end) - 1
            last = tl.load(decays + row_of_head + last_at)
            read = scale * tl.exp(total)
            left = tl.exp(last - total)
            if NORMALISE:
                read *= tl.load(lengths_q + row_of_key + at, mask=valid, other=0.0)
                left *= tl.load(lengths_k + row_of_key + at, mask=valid, other=0.0)
            kind = rows_w.dtype

            before = state.to(kind)
            written = tl.where(valid[:, None], written - tl.dot(rows_w, before), 0.0)
            out = tl.dot(rows_q, before) * read[:, None]
            out += tl.dot(scores, written.to(kind))
            o_at = o + at[:, None] * o_stride + head * V + columns[None, :]
            tl.store(o_at, out.to(o.dtype.element_ty), mask=valid[:, None])
            state *= tl.exp(last)
            state += tl.dot(tl.trans(rows_k), (written * left[:, None]).to(kind))

        if FINAL:
            final_at = final + slot * final_stride + place
            if KV:
                tl.store(final_at, state.to(final.dtype.element_ty), mask=kept)
            else:
                tl.store(final_at, tl.trans(state).to(final.dtype.element_ty), mask=kept)

"""Each chunk's output, all chunks at once, in Triton.

With S [K, V] before the chunk and r, both from carry_kernel, and G the running sum of g:

    o = scale (exp(G) q S + (q k^T exp(G[i] - G[j])) r),    j <= i.

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.prepare_kernel import over_length


@triton.jit(do_not_specialize=("tokens",))
def output_kernel(
    q,
    k,
    r,
    totals,
    states,
    o,
    cu_seqlens,
    chunk_indices,
    q_stride,
    k_stride,
    o_stride,
    tokens,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
):
    """COLUMNS of the output of one chunk of one value head.

    q, k [T, H, K]; r [T, HV, V]; totals [HV, T] = G; states [C, HV, K, V]; o [T, HV, V].
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    key_head = head // (HV // H)
    sequence = tl.load(chunk_indices + 2 * chunk)
    start = tl.load(cu_seqlens + sequence) + tl.load(chunk_indices + 2 * chunk + 1) * CHUNK
    end = tl.load(cu_seqlens + sequence + 1)
    i = tl.arange(0, CHUNK)
    valid = start + i < end
    # In int64: tokens times heads times their size outgrow int32; within a chunk they do not.
    first = start.to(tl.int64)
    rows = tl.arange(0, K)
    columns = part * COLUMNS + tl.arange(0, COLUMNS)
    rows_q = tl.load(
        q + first * q_stride + key_head * K + i[:, None] * q_stride + rows[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    rows_k = tl.load(
        k + first * k_stride + key_head * K + i[:, None] * k_stride + rows[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    before = tl.load(
        states + (chunk.to(tl.int64) * HV + head) * (K * V) + rows[:, None] * V + columns[None, :]
    )
    written = tl.load(
        r + (first * HV + head) * V + i[:, None] * (HV * V) + columns[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    total = tl.load(totals + head.to(tl.int64) * tokens + first + i, mask=valid, other=0.0)
    kind = rows_q.dtype
    lower = i[:, None] >= i[None, :]
    scores = tl.dot(rows_q, tl.trans(rows_k))
    out = tl.dot(rows_q, before)
    # Above the diagonal the exponent is positive and without bound.
    decay = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0))
    over = tl.zeros([CHUNK], dtype=tl.float32) + scale
    if NORMALISE:
        decay *= over_length(rows_k, EPS)[None, :]
        over *= over_length(rows_q, EPS)
    scores = tl.where(lower, scores * decay, 0.0).to(kind)
    out = out * tl.exp(total)[:, None] + tl.dot(scores, written)
    o_at = o + first * o_stride + head * V + i[:, None] * o_stride + columns[None, :]
    tl.store(o_at, (out * over[:, None]).to(o.dtype.element_ty), mask=valid[:, None])

"""What the delta rule needs of each chunk alone, for all chunks at once, in Triton.

Within a chunk the rule is a linear system: with G the running sum of g, and for j < i

    A[i, j] = beta[i] * (k[i] . k[j]) * exp(G[i] - G[j]),    (I + A) u = beta v,
                                                             (I + A) w = beta exp(G) k.

u and w then take any state S to what is written to it: u - w S. Source: Gated Delta Networks,
arXiv:2412.06464, section 3.3. One source for CUDA and for Ascend; importing it imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _unit(x, EPS: tl.constexpr):
    """Rows of length 1."""
    return x * tl.rsqrt(tl.sum(x * x, 1) + EPS)[:, None]


@triton.jit
def _inverse(a, CHUNK: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a) inverted, for a strictly lower triangular.

    Blocks of PART on the diagonal by forward substitution, which is stable; the rest by a series
    that ends behind CHUNK / PART terms. Here those are four.
    """
    PARTS: tl.constexpr = CHUNK // PART
    block = tl.arange(0, PARTS)
    same = block[:, None, None, None] == block[None, None, :, None]
    # [block, row, column]: the blocks on the diagonal.
    inner = tl.sum(tl.where(same, tl.reshape(a, [PARTS, PART, PARTS, PART]), 0.0), 2)
    row = tl.arange(0, PART)[None, :, None]
    column = tl.arange(0, PART)[None, None, :]
    found = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(inner)
    for i in range(1, PART):
        factors = tl.sum(tl.where(row == i, inner, 0.0), 1)
        solved = tl.sum(factors[:, :, None] * found, 1)
        found = tl.where(row == i, found - solved[:, None, :], found)
    whole = tl.reshape(tl.where(same, found[:, :, None, :], 0.0), [CHUNK, CHUNK])
    i = tl.arange(0, CHUNK)
    below = (i[:, None] // PART) > (i[None, :] // PART)
    m = tl.dot(whole, tl.where(below, a, 0.0), input_precision=PRECISION)
    part = whole - tl.dot(m, whole, input_precision=PRECISION)
    return part + tl.dot(tl.dot(m, m, input_precision=PRECISION), part, input_precision=PRECISION)


@triton.jit
def prepare_kernel(
    q,
    k,
    v,
    g,
    beta,
    unit_q,
    unit_k,
    w,
    u,
    p,
    decays,
    cu_seqlens,
    chunk_indices,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of one value head.

    Of q, k [T, H, K], v [T, HV, V] and g, beta [T, HV] it makes w [T, HV, K], u [T, HV, V],
    p [T, HV, CHUNK] = scale (q k^T) exp(G[i] - G[j]) and decays [T, HV] = G; with NORMALISE also
    unit_q, unit_k [T, H, K].
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HV // H)
    sequence = tl.load(chunk_indices + 2 * chunk)
    start = tl.load(cu_seqlens + sequence) + tl.load(chunk_indices + 2 * chunk + 1) * CHUNK
    end = tl.load(cu_seqlens + sequence + 1)
    i = tl.arange(0, CHUNK)
    valid = start + i < end
    # In int64: tokens times heads times their size outgrow int32.
    at = start.to(tl.int64) + i
    columns = tl.arange(0, K)
    k_at = k + at[:, None] * k_stride + key_head * K + columns[None, :]
    q_at = q + at[:, None] * q_stride + key_head * K + columns[None, :]
    rows_k = tl.load(k_at, mask=valid[:, None], other=0.0)
    rows_q = tl.load(q_at, mask=valid[:, None], other=0.0)
    kind = rows_k.dtype
    if NORMALISE:
        rows_k = _unit(rows_k.to(tl.float32), EPS).to(kind)
        rows_q = _unit(rows_q.to(tl.float32), EPS).to(kind)
        if head % (HV // H) == 0:
            out_at = (at[:, None] * H + key_head) * K + columns[None, :]
            tl.store(unit_k + out_at, rows_k, mask=valid[:, None])
            tl.store(unit_q + out_at, rows_q, mask=valid[:, None])

    steps = tl.load(g + at * g_stride + head, mask=valid, other=0.0).to(tl.float32)
    weights = tl.load(beta + at * beta_stride + head, mask=valid, other=0.0).to(tl.float32)
    lower = i[:, None] >= i[None, :]
    total = tl.sum(tl.where(lower, steps[None, :], 0.0), 1)
    tl.store(decays + at * HV + head, total, mask=valid)
    # Above the diagonal the exponent is positive and without bound.
    decay = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0))

    scores = tl.dot(rows_q, tl.trans(rows_k)) * (scale * decay)
    p_at = p + (at[:, None] * HV + head) * CHUNK + i[None, :]
    tl.store(p_at, tl.where(lower, scores, 0.0).to(kind), mask=valid[:, None])

    a = tl.dot(rows_k, tl.trans(rows_k)) * (weights[:, None] * decay)
    solve = _inverse(tl.where(i[:, None] > i[None, :], a, 0.0), CHUNK, 16, PRECISION).to(kind)
    scaled = (rows_k.to(tl.float32) * (weights * tl.exp(total))[:, None]).to(kind)
    w_at = w + (at[:, None] * HV + head) * K + columns[None, :]
    tl.store(w_at, tl.dot(solve, scaled).to(kind), mask=valid[:, None])
    columns_v = tl.arange(0, V)
    v_at = v + at[:, None] * v_stride + head * V + columns_v[None, :]
    values = tl.load(v_at, mask=valid[:, None], other=0.0).to(tl.float32)
    values = (values * weights[:, None]).to(kind)
    u_at = u + (at[:, None] * HV + head) * V + columns_v[None, :]
    tl.store(u_at, tl.dot(solve, values).to(kind), mask=valid[:, None])

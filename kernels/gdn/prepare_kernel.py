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
def over_length(x, EPS: tl.constexpr):
    """1 over the length of each row, float32."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + EPS)


@triton.jit
def inverse(a, CHUNK: tl.constexpr, KIND: tl.constexpr):
    """(I + a) inverted, for a strictly lower triangular; products of numbers rounded to KIND.

    Two inverted blocks b and c on the diagonal, and a block d of a below b: what stands there in
    the inverse is -c d b. So the blocks that are right double in size, from single elements on;
    what is computed on the way is always a part of the inverse, which keeps it from growing, and
    each element is rounded once.
    """
    i = tl.arange(0, CHUNK)
    apart = i[:, None] ^ i[None, :]
    a = a.to(KIND)
    found = tl.where(apart == 0, 1.0, tl.where(apart == 1, -a, 0.0)).to(KIND)
    for level in tl.static_range(1, 6):
        size = 1 << level
        # Rows and columns whose blocks of that size differ, and those of twice the size do not.
        between = tl.where((apart >= size) & (apart < 2 * size), a, 0.0).to(KIND)
        found -= tl.dot(tl.dot(found, between).to(KIND), found).to(KIND)
    return found


@triton.jit(do_not_specialize=("tokens",))
def prepare_kernel(
    q,
    k,
    v,
    g,
    beta,
    lengths_q,
    lengths_k,
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
    SOLVE: tl.constexpr,
    totals=None,
    left=None,
    lasts=None,
    tokens=0,
    SCORES: tl.constexpr = True,
):
    """One chunk of one value head.

    Of q, k [T, H, K], v [T, HV, V] and g, beta [T, HV] it makes w [T, HV, K] and u [T, HV, V]. With
    NORMALISE rows of q and k count as divided by their lengths.

    With SCORES, for scan_kernel: p [T, HV, CHUNK] = scale (q k^T) exp(G[i] - G[j]), decays [T, HV]
    = G, and lengths_q, lengths_k [T, H], 1 over the lengths. Without, for carry_kernel and
    output_kernel: totals [HV, T] = G, left [HV, T] = exp(G_last - G), over k's length, and lasts
    [C, HV] = exp(G_last).
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HV // H)
    sequence = tl.load(chunk_indices + 2 * chunk)
    start = tl.load(cu_seqlens + sequence) + tl.load(chunk_indices + 2 * chunk + 1) * CHUNK
    end = tl.load(cu_seqlens + sequence + 1)
    i = tl.arange(0, CHUNK)
    valid = start + i < end
    # In int64: tokens times heads times their size outgrow int32; within a chunk they do not.
    first = start.to(tl.int64)
    columns = tl.arange(0, K)
    rows_k = tl.load(
        k + first * k_stride + key_head * K + i[:, None] * k_stride + columns[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    kind = rows_k.dtype
    if NORMALISE:
        length_k = over_length(rows_k, EPS)
        if SCORES and head % (HV // H) == 0:
            tl.store(lengths_k + first * H + key_head + i * H, length_k, mask=valid)

    steps = tl.load(g + first * g_stride + head + i * g_stride, mask=valid, other=0.0).to(
        tl.float32
    )
    weights = tl.load(
        beta + first * beta_stride + head + i * beta_stride, mask=valid, other=0.0
    ).to(tl.float32)
    lower = i[:, None] >= i[None, :]
    total = tl.sum(tl.where(lower, steps[None, :], 0.0), 1)
    if SCORES:
        tl.store(decays + first * HV + head + i * HV, total, mask=valid)
    else:
        last = tl.sum(steps, 0)
        rest = tl.exp(last - total)
        if NORMALISE:
            rest *= length_k
        row = head.to(tl.int64) * tokens + first
        tl.store(totals + row + i, total, mask=valid)
        tl.store(left + row + i, rest, mask=valid)
        tl.store(lasts + chunk * HV + head, tl.exp(last))
    # Above the diagonal the exponent is positive and without bound.
    decay = tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0))

    into = weights
    if NORMALISE:
        into = weights * length_k
        decay *= length_k[None, :]
    # What is j's part of a length is in decay, what is i's in the factor of a row.
    a = tl.dot(rows_k, tl.trans(rows_k)) * (into[:, None] * decay)
    solve = inverse(tl.where(i[:, None] > i[None, :], a, 0.0), CHUNK, SOLVE).to(kind)
    scaled = (rows_k.to(tl.float32) * (into * tl.exp(total))[:, None]).to(kind)
    w_at = w + first * (HV * K) + head * K + i[:, None] * (HV * K) + columns[None, :]
    tl.store(w_at, tl.dot(solve, scaled).to(kind), mask=valid[:, None])

    if SCORES:
        rows_q = tl.load(
            q + first * q_stride + key_head * K + i[:, None] * q_stride + columns[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        out = tl.zeros([CHUNK], dtype=tl.float32) + scale
        if NORMALISE:
            length_q = over_length(rows_q, EPS)
            out *= length_q
            if head % (HV // H) == 0:
                tl.store(lengths_q + first * H + key_head + i * H, length_q, mask=valid)
        scores = tl.dot(rows_q, tl.trans(rows_k)) * (out[:, None] * decay)
        p_at = p + first * (HV * CHUNK) + head * CHUNK + i[:, None] * (HV * CHUNK) + i[None, :]
        tl.store(p_at, tl.where(lower, scores, 0.0).to(kind), mask=valid[:, None])

    columns_v = tl.arange(0, V)
    values = tl.load(
        v + first * v_stride + head * V + i[:, None] * v_stride + columns_v[None, :],
        mask=valid[:, None],
        other=0.0,
    ).to(tl.float32)
    values = (values * weights[:, None]).to(kind)
    u_at = u + first * (HV * V) + head * V + i[:, None] * (HV * V) + columns_v[None, :]
    tl.store(u_at, tl.dot(solve, values).to(kind), mask=valid[:, None])

"""prepare_kernel's work as an Ascend core can do it: what the delta rule needs of each chunk alone.

The formulas are prepare_kernel's. What the compiler of Ascend makes different:

- A fixed grid loops over the chunks of all heads.
- No vector serves both as a column and as a row: one of them would lie 32 bytes apart in the
  unified buffer, and every matrix it meets eight times as large. So sums are taken twice, along
  either axis, and lengths of k are read off the diagonal of k k^T.
- K and V are worked through in tiles.
- A matrix product has real rows only: what lies behind them is not zero but whatever the buffer
  held, so it is masked before it meets another product.
- decays and lengths have a head's tokens side by side, for a copy of one run of memory.

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse(a, CHUNK: tl.constexpr, KIND: tl.constexpr):
    """prepare_kernel's inverse of I + a, from the first product to the last on the cube core.

    What stands between two blocks is masked beforehand, and the sum of a level is a product with
    the identity, added to where products are: the vector cores are not waited for in between.
    """
    i = tl.arange(0, CHUNK)
    apart = i[:, None] ^ i[None, :]
    a = a.to(KIND)
    identity = tl.where(apart == 0, 1.0, 0.0).to(KIND)
    found = tl.where(apart == 0, 1.0, tl.where(apart == 1, -a, 0.0)).to(KIND)
    for level in tl.static_range(1, 6):
        size = 1 << level
        # Rows and columns whose blocks of that size differ, and those of twice the size do not.
        between = tl.where((apart >= size) & (apart < 2 * size), -a, 0.0).to(KIND)
        step = tl.dot(found, between).to(KIND)
        found = tl.dot(step, found, tl.dot(found, identity)).to(KIND)
    return found


# A batch's size is no reason to compile again.
@triton.jit(do_not_specialize=["tokens", "items"])
def prepare_loop(
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
    tokens,
    items,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """Every n-th of ``items``, chunks times value heads, where n is the number of programs.

    Of q, k [T, H, K], v [T, HV, V] and g, beta [T, HV] it makes w [T, HV, K], u [T, HV, V],
    p [T, HV, CHUNK] = scale (q k^T) exp(G[i] - G[j]) and decays [HV, T] = G. With NORMALISE rows of
    q and k count as divided by their lengths; lengths_q, lengths_k [H, T] are 1 over these.
    """
    i = tl.arange(0, CHUNK)
    columns = tl.arange(0, K)
    part = tl.arange(0, TILE)
    diagonal = i[:, None] == i[None, :]
    lower = i[:, None] >= i[None, :]
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk = item // HV
        head = item % HV
        key_head = head // (HV // H)
        sequence = tl.load(chunk_indices + 2 * chunk)
        start = tl.load(cu_seqlens + sequence) + tl.load(chunk_indices + 2 * chunk + 1) * CHUNK
        end = tl.load(cu_seqlens + sequence + 1)
        valid = start + i < end
        # In int64: tokens times heads times their size outgrow int32; within a chunk they do not.
        first = start.to(tl.int64)
        row_of_head = head.to(tl.int64) * tokens + first
        row_of_key = key_head.to(tl.int64) * tokens + first
        k_at = k + first * k_stride + key_head * K + i[:, None] * k_stride
        q_at = q + first * q_stride + key_head * K + i[:, None] * q_stride
        v_at = v + first * v_stride + head * V + i[:, None] * v_stride
        rows_k = tl.load(k_at + columns[None, :], mask=valid[:, None], other=0.0)
        rows_q = tl.load(q_at + columns[None, :], mask=valid[:, None], other=0.0)
        kind = rows_k.dtype
        products = tl.dot(rows_k, tl.trans(rows_k))
        scores = tl.dot(rows_q, tl.trans(rows_k))
        if NORMALISE:
            squares_k = tl.where(diagonal, products, 0.0)
            length_j = tl.where(valid, tl.rsqrt(tl.sum(squares_k, 0) + EPS), 0.0)
            length_k = tl.rsqrt(tl.sum(squares_k, 1) + EPS)
            squares_q = tl.zeros([CHUNK], dtype=tl.float32)
            for at in tl.static_range(0, K, TILE):
                tile_q = tl.load(q_at + at + part[None, :], mask=valid[:, None], other=0.0)
                tile_q = tile_q.to(tl.float32)
                squares_q += tl.sum(tile_q * tile_q, 1)
            length_q = tl.rsqrt(squares_q + EPS)
            if head % (HV // H) == 0:
                tl.store(lengths_k + row_of_key + i, length_j, mask=valid)
                tl.store(lengths_q + row_of_key + i, length_q, mask=valid)
            products *= length_j[None, :] * length_k[:, None]
            scores *= length_j[None, :] * (length_q * scale)[:, None]
        else:
            scores *= scale

        steps = tl.load(g + first * g_stride + head + i * g_stride, mask=valid, other=0.0)
        weights = tl.load(
            beta + first * beta_stride + head + i * beta_stride, mask=valid, other=0.0
        ).to(tl.float32)
        reached = tl.where(i[:, None] <= i[None, :], steps.to(tl.float32)[:, None], 0.0)
        total_j = tl.sum(reached, 0)
        total = tl.sum(tl.where(diagonal, total_j[None, :], 0.0), 1)
        tl.store(decays + row_of_head + i, total_j, mask=valid)
        # Above the diagonal the exponent is positive and without bound.
        decay = tl.exp(tl.where(lower, total[:, None] - total_j[None, :], 0.0))
        p_at = p + first * (HV * CHUNK) + head * CHUNK + i[:, None] * (HV * CHUNK) + i[None, :]
        tl.store(p_at, tl.where(lower, scores * decay, 0.0).to(kind), mask=valid[:, None])

        a = products * decay * weights[:, None]
        below = (i[:, None] > i[None, :]) & valid[:, None]
        solve = _inverse(tl.where(below, a, 0.0), CHUNK, SOLVE).to(kind)
        into = weights * tl.exp(total)
        if NORMALISE:
            into *= length_k
        w_at = w + first * (HV * K) + head * K + i[:, None] * (HV * K)
        u_at = u + first * (HV * V) + head * V + i[:, None] * (HV * V)
        for at in tl.static_range(0, K, TILE):
            tile_k = tl.load(k_at + at + part[None, :], mask=valid[:, None], other=0.0)
            scaled = tl.where(valid[:, None], tile_k.to(tl.float32) * into[:, None], 0.0).to(kind)
            of_w = tl.dot(solve, scaled).to(kind)
            tl.store(w_at + at + part[None, :], of_w, mask=valid[:, None])
        for at in tl.static_range(0, V, TILE):
            tile_v = tl.load(v_at + at + part[None, :], mask=valid[:, None], other=0.0)
            values = (tile_v.to(tl.float32) * weights[:, None]).to(kind)
            of_u = tl.dot(solve, values).to(kind)
            tl.store(u_at + at + part[None, :], of_u, mask=valid[:, None])

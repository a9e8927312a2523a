"""Attention by its definition, one request and one head at a time, in float64.

Masks are written as op-plugin's own operator tests write theirs: two triangles of numpy's. Nothing
here is shared with what it judges.
"""

from __future__ import annotations

import numpy as np


def hidden(rows, columns, mode, pre, after, mask=None):
    """[rows, columns], True where a row does not see a column."""
    ones = np.ones((rows, columns), bool)
    if mode == 0 and mask is None:
        return ~ones
    if mode == 0:
        return mask[:rows, :columns] | np.triu(ones, after + 1) | np.tril(ones, -pre - 1)
    if mode == 1:
        return mask[:rows, :columns]
    if mode == 2:
        return np.triu(ones, 1)
    corner = columns - rows
    if mode == 3:
        return np.triu(ones, corner + 1)
    assert mode == 4
    return np.triu(ones, corner + after + 1) | np.tril(ones, corner - pre - 1)


def attention(query, key, value, scale, unseen, sinks=None):
    """One request: query [S, N, D], key [K, KV_N, D], value [K, KV_N, Dv], unseen [S, K].

    Returns (output [S, N, Dv], log-sum-exp [S, N]); rows that see nothing are 0 and inf.
    """
    rows, heads, _ = query.shape
    group = heads // key.shape[1]
    out = np.zeros((rows, heads, value.shape[2]))
    lse = np.full((rows, heads), np.inf)
    for head in range(heads):
        q = query[:, head].astype(np.float64)
        k = key[:, head // group].astype(np.float64)
        v = value[:, head // group].astype(np.float64)
        scores = (q @ k.T) * scale
        for row in range(rows):
            seen = np.flatnonzero(~unseen[row])
            if not seen.size:
                continue
            weights = np.exp(scores[row, seen])
            total = weights.sum()
            if sinks is not None:
                total = total + np.exp(np.float64(sinks[head]))
            out[row, head] = (weights / total) @ v[seen]
            lse[row, head] = np.log(total)
    return out, lse


def allowed_error(expected, dtype):
    """Half a unit in the last place of the output's dtype, and float32 arithmetic."""
    relative = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    return np.abs(expected) * relative + 2e-5


def assert_close(got, expected, dtype, what="attention_out"):
    """``got`` is a float64 array; NaN is never right."""
    worst = np.abs(got - expected) - allowed_error(expected, dtype)
    # Not `worst > 0`: a NaN is above nothing.
    wrong = ~(worst <= 0)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.size} numbers are wrong, "
        f"the largest error is {np.nanmax(np.abs(got - expected)):.3g}"
    )

"""Attention itself, softmax(scale * QK^T) V of one request in float32, and the masks' geometry."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores that exist at a time, in elements: 128 MiB of float32.
_MOST_SCORES = 1 << 25


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one request.

    Args:
        query: [S, N, D].
        key: [K, KV_N, D]; N is a multiple of KV_N, and query head n reads kv head n // (N / KV_N).
        value: [K, KV_N, Dv].
        scale: Applied to the products of query and key.
        hidden: [S, K], True where a row does not see a column; None where it sees all.
        sink: [N], one more logit per head, which takes part in the sum and has no value.
        bias: [S, K], added to the scaled products.

    Returns:
        (output [S, N, Dv], largest score [S, N], sum of exponentials [S, N]), all float32. A row
        that sees nothing is 0, and so is its sum unless there is a sink.
    """
    rows, heads, _ = query.shape
    columns, kv_heads, width = value.shape
    out = torch.zeros(rows, heads, width)
    maxima, sums = torch.zeros(rows, heads), torch.zeros(rows, heads)
    if not rows or not columns:
        return out, maxima, sums
    group = heads // kv_heads
    keys = key.float().permute(1, 2, 0)
    values = value.float().transpose(0, 1)
    extra = None if sink is None else sink.float()[:, None]
    step = max(1, _MOST_SCORES // (heads * columns))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        size = part.stop - part.start
        # [KV_N, group * rows, D]: each kv head is read once for all of its query heads.
        asked = query[part].float().view(size, kv_heads, group, -1).permute(1, 2, 0, 3)
        scores = (asked.reshape(kv_heads, group * size, -1) @ keys).mul_(scale)
        scores = scores.view(heads, size, columns)
        if bias is not None:
            scores += bias[part]
        if hidden is not None:
            scores.masked_fill_(hidden[part], float("-inf"))
        largest = scores.amax(-1)
        if extra is not None:
            largest = torch.maximum(largest, extra)
        largest = largest.masked_fill(largest == float("-inf"), 0.0)
        weights = scores.sub_(largest[..., None]).exp_()
        total = weights.sum(-1)
        if extra is not None:
            total = total + torch.exp(extra - largest)
        found = weights.view(kv_heads, group * size, columns) @ values
        # A row that sees nothing has the sum 0 and weights that are 0.
        found = found.view(heads, size, width) / total.masked_fill(total == 0, 1.0)[..., None]
        out[part] = found.transpose(0, 1)
        maxima[part], sums[part] = largest.transpose(0, 1), total.transpose(0, 1)
    return out, maxima, sums


def log_sum_exp(maxima: Tensor, sums: Tensor) -> Tensor:
    """The log-sum-exp of each row; inf for a row that sees nothing, as the operators have it."""
    found = maxima + torch.log(sums)
    return found.masked_fill(sums == 0, float("inf"))


def seen_columns(rows: int, columns: int, first_row: int, below: int, above: int) -> slice:
    """The columns that at least one row of a band sees; see ``band``. Empty where none does."""
    start = max(0, first_row - below)
    stop = min(columns, first_row + rows - 1 + above + 1)
    return slice(start, max(start, stop))


def band(rows: int, columns: slice, first_row: int, below: int, above: int) -> Tensor | None:
    """What a row does not see of ``columns`` where it sees a band around its own position.

    Row r stands at position first_row + r; it sees column j if position - below <= j and
    j <= position + above. Returns [rows, columns], True where hidden; None where nothing is.
    """
    last = first_row + rows - 1
    if last - below <= columns.start and first_row + above >= columns.stop - 1:
        return None
    positions = torch.arange(first_row, first_row + rows)[:, None]
    places = torch.arange(columns.start, columns.stop)[None, :]
    return (places < positions - below) | (places > positions + above)

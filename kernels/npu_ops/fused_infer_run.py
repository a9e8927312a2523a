"""The answer of fused inference attention, one request after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import blocks, softmax
from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem

_LEFT_UP, _RIGHT_DOWN, _BAND = 2, 3, 4


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """attention_out, softmax_lse of a call whose arguments have passed the checks.

    attention_out has the query's dtype; softmax_lse is float32, [T, N, 1] or [B, N, S, 1], or one
    0 where it was not asked for. Rows beyond a request's length are 0.
    """
    rows = _rows_first(problem, problem.query, problem.heads)
    out = torch.zeros(*rows.shape[:-1], problem.value_width)
    lse = torch.full(rows.shape[:-1], float("inf"))
    if out.numel():
        for index, (place, length) in enumerate(_queries(problem)):
            found = _request(problem, index, rows[place], length)
            if found is not None:
                out[place], lse[place] = found
    result = _laid_out(problem, out.to(problem.query.dtype))
    if not problem.with_lse:
        return result, torch.zeros(1)
    # [B, S, N] -> [B, N, S, 1]; [T, N] -> [T, N, 1]
    return result, (lse if problem.ragged else lse.transpose(1, 2))[..., None].contiguous()


def _rows_first(problem: Problem, x: Tensor, heads: int) -> Tensor:
    """[B, S, N, D], or [T, N, D] of a ragged layout."""
    letters = problem.letters
    if letters == "BSH":
        return x.unflatten(-1, (heads, -1))
    if letters == "BNSD":
        return x.transpose(1, 2)
    return x.transpose(0, 1) if letters == "NTD" else x


def _laid_out(problem: Problem, out: Tensor) -> Tensor:
    if problem.letters == "BSH":
        return out.flatten(-2)
    return out.transpose(1, 2).contiguous() if problem.layout == "BNSD" else out


def _queries(problem: Problem) -> Iterator[tuple[slice | tuple[int, slice], int]]:
    """Where each request's rows are, and how many."""
    lens = problem.query_lens
    if problem.ragged:
        start = 0
        for end in lens or ():
            yield slice(start, end), end - start
            start = end
        return
    for index in range(problem.batch):
        length = problem.query_rows
        if lens and not problem.single:
            length = lens[0] if len(lens) == 1 else lens[index]
        yield (index, slice(0, length)), length


def kv_span(problem: Problem, index: int) -> tuple[int, int]:
    """Where a request's keys begin in a ragged layout without pages (else 0), and how many."""
    lens = problem.kv_lens
    if problem.ragged and not problem.paged:
        assert lens is not None
        start = lens[index - 1] if index else 0
        return start, lens[index] - start
    if lens:
        return 0, lens[0] if len(lens) == 1 else lens[index]
    return 0, problem.key.shape[problem.letters.index("S")]


def _request(problem: Problem, index: int, query: Tensor, rows: int) -> tuple[Tensor, ...] | None:
    start, columns = kv_span(problem, index)
    if not rows or not columns:
        return None
    seen, hidden = _sight(problem, index, rows, columns)
    if seen.start == seen.stop:
        return None
    if problem.paged:
        assert problem.block_table is not None
        table = problem.block_table[index]
        key, value = (
            blocks.gather(cache, table, seen, problem.kv_heads, problem.heads_first)
            for cache in (problem.key, problem.value)
        )
    else:
        place = slice(start + seen.start, start + seen.stop)
        key, value = (
            x[place] if problem.ragged else x[index, place]
            for x in (
                _rows_first(problem, y, problem.kv_heads) for y in (problem.key, problem.value)
            )
        )
    key = _widened(key, problem.key_scale, problem.key_offset)
    value = _widened(value, problem.value_scale, problem.value_offset)
    out, maxima, sums = softmax.attend(query, key, value, problem.scale, hidden, problem.sink)
    return out, softmax.log_sum_exp(maxima, sums)


def _widened(x: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """int8 [rows, KV_N, D] to float32: (x + offset) * scale, as torch_npu's npu_anti_quant."""
    if scale is None:
        return x
    shape = (1, *x.shape[1:]) if scale.numel() > 1 else (1, 1, 1)
    wide = x.float()
    if offset is not None:
        wide = wide + offset.float().reshape(shape)
    return wide * scale.float().reshape(shape)


def _sight(problem: Problem, index: int, rows: int, columns: int) -> tuple[slice, Tensor | None]:
    """The columns that any row sees, and what is hidden of them."""
    mode, every = problem.sparse_mode, slice(0, columns)
    # On the decode path sparse_mode, pre_tokens and next_tokens are void.
    if mode in (_LEFT_UP, _RIGHT_DOWN, _BAND):
        if problem.single:
            return every, None
        first = 0 if mode == _LEFT_UP else columns - rows
        below = problem.pre_tokens if mode == _BAND else columns + rows
        above = problem.next_tokens if mode == _BAND else 0
        seen = softmax.seen_columns(rows, columns, first, below, above)
        return seen, softmax.band(rows, seen, first, below, above)
    if problem.mask is None:
        return every, None
    hidden = _own_mask(problem, index)[:rows, :columns].bool()
    if mode == 0 and not problem.single:
        outside = softmax.band(rows, every, 0, problem.pre_tokens, problem.next_tokens)
        hidden = hidden if outside is None else hidden | outside
    return every, hidden


def _own_mask(problem: Problem, index: int) -> Tensor:
    """The request's [rows, columns] of a mask that is given in full."""
    mask = problem.mask
    assert mask is not None
    if mask.dim() == 2:
        return mask[index][None] if problem.single else mask
    own = mask[0 if mask.shape[0] == 1 else index]
    return own[0] if own.dim() == 3 else own

"""What ATB's sources and torch_npu's documentation rule out where a paged KV cache is read."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.cache_checks import (
    ALIGNED,
    NORM_SINCE,
    caches,
    into,
    movable,
    same_dtype,
)
from ascend_patch.kernels.npu_ops.errors import OperatorError, require
from ascend_patch.kernels.npu_ops.settings import allowed, torch_npu_at_least

_MOST_BYTES = 148 * 1024


def gather_pa_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    seq_offset: Tensor | None,
    cumsum: bool,
) -> list[int]:
    """The length of each sequence. The operator exists since torch_npu 2.10."""
    operator = "npu_gather_pa_kv_cache"
    if not torch_npu_at_least(NORM_SINCE):
        raise OperatorError(f"{operator}: exists since torch_npu {NORM_SINCE}")
    _paged(operator, key_cache, value_cache, block_tables, key, value)
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        movable(operator, f"{name}_cache", cache)
        same_dtype(operator, **{name: x, f"{name}_cache": cache})
        size = x[0].numel() * x.element_size() if x.shape[0] else 0
        if size > _MOST_BYTES:
            raise OperatorError(
                f"{operator}: a token of {name} is {size} bytes; the most is {_MOST_BYTES}"
            )
    _whole(
        operator,
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        key=key,
        value=value,
        seq_offset=seq_offset,
    )
    int32(operator, block_tables=block_tables, seq_lens=seq_lens)
    spans = _lengths(operator, "seq_lens", seq_lens, block_tables.shape[0], cumsum)
    _starts(operator, "seq_offset", seq_offset, block_tables.shape[0])
    if spans[0][0] or spans[-1][1] != key.shape[0]:
        raise OperatorError(
            f"{operator}: key has {key.shape[0]} rows and seq_lens go from {spans[0][0]} to "
            f"{spans[-1][1]}; they must begin with 0 and end with the rows"
        )
    if not allowed("absent_blocks"):
        _blocks(operator, block_tables, key_cache.shape[0])
    return [end - start for start, end in spans]


def _whole(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not (x.is_contiguous() and x.numel()):
            raise OperatorError(
                f"{operator}: {name} {list(x.shape)} must be contiguous and not empty"
            )


def int32(operator: str, **tensors: Tensor) -> None:
    """Refuse indices of another dtype."""
    for name, x in tensors.items():
        if x.dtype != torch.int32:
            raise OperatorError(f"{operator}: {name} is {x.dtype}, not torch.int32")


def _paged(
    operator: str,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key: Tensor,
    value: Tensor,
) -> None:
    into(operator, "key", key, key_cache)
    into(operator, "value", value, value_cache)
    caches(operator, key_cache, value_cache, 2)
    if key.shape[0] != value.shape[0]:
        raise OperatorError(
            f"{operator}: key {list(key.shape)} and value {list(value.shape)} must have the same "
            "tokens"
        )
    if block_table.dim() != 2 or not block_table.numel():
        raise OperatorError(
            f"{operator}: the block table {list(block_table.shape)} must be [batch, blocks], not "
            "empty"
        )


def _lengths(
    operator: str, name: str, lens: Tensor, batch: int, cumsum: bool
) -> list[tuple[int, int]]:
    """(start, end) of each sequence among the rows."""
    if tuple(lens.shape) != (batch + cumsum,):
        kind = "cumulative ones" if cumsum else "lengths"
        raise OperatorError(
            f"{operator}: {name} {list(lens.shape)} must hold {batch + cumsum} {kind} for a batch "
            f"of {batch}"
        )
    values = [int(x) for x in lens]
    if not cumsum:
        ends = [sum(values[: i + 1]) for i in range(batch)]
        values = [0, *ends]
    spans = list(itertools.pairwise(values))
    if (values and values[0] < 0) or any(start > end for start, end in spans):
        raise OperatorError(
            f"{operator}: {name} {[int(x) for x in lens]} must "
            + ("start at 0 or more and not fall" if cumsum else "not be negative")
        )
    return spans


def _starts(operator: str, name: str, starts: Tensor | None, batch: int) -> None:
    if starts is None:
        return
    if starts.dtype != torch.int32 or tuple(starts.shape) != (batch,):
        raise OperatorError(
            f"{operator}: {name} is {list(starts.shape)} of {starts.dtype}; it must be int32 "
            f"[{batch}]"
        )
    require(
        not batch or int(starts.min()) >= 0, operator, f"{name} {starts.tolist()} has negative ones"
    )


def context_tokens(context_lens: Tensor, cumsum: bool) -> int:
    """How many rows npu_paged_cache_load returns."""
    if not context_lens.numel():
        return 0
    return int(context_lens[-1]) if cumsum else int(context_lens.sum())


def paged_cache_load(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    seq_starts: Tensor | None,
    cumsum: bool,
    key: Tensor,
    value: Tensor,
) -> list[tuple[int, int, int]]:
    """(first row, end, first column of the block table) of each context."""
    operator = "npu_paged_cache_load"
    _paged(operator, key_cache, value_cache, block_table, key, value)
    movable(operator, "key_cache", key_cache)
    same_dtype(operator, key_cache=key_cache, value_cache=value_cache, key=key, value=value)
    int32(operator, block_table=block_table, context_lens=context_lens)
    for name, cache in {"key_cache": key_cache, "value_cache": value_cache}.items():
        size = cache.shape[2] * cache.shape[3] * cache.element_size()
        if size % ALIGNED:
            raise OperatorError(
                f"{operator}: heads * head_size of {name} {list(cache.shape)} is {size} bytes; it "
                f"must be a multiple of {ALIGNED}"
            )
    batch, columns = block_table.shape
    spans = _lengths(operator, "context_lens", context_lens, batch, cumsum)
    _starts(operator, "seq_starts", seq_starts, batch)
    block_size, found = key_cache.shape[1], []
    for request, (start, end) in enumerate(spans):
        first = 0 if seq_starts is None else int(seq_starts[request]) // block_size
        blocks = -((start - end) // block_size)
        if first + blocks > columns and blocks:
            raise OperatorError(
                f"{operator}: context {request} is read from blocks {first} to "
                f"{first + blocks - 1} of a table that has {columns}"
            )
        _blocks(operator, block_table[request, first : first + blocks], key_cache.shape[0])
        found.append((start, end, first))
    if spans and spans[-1][1] > key.shape[0]:
        raise OperatorError(
            f"{operator}: the contexts are {spans[-1][1]} tokens and key has {key.shape[0]} rows"
        )
    return found


def _blocks(operator: str, ids: Tensor, blocks: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < blocks:
        raise OperatorError(
            f"{operator}: the block table names blocks {int(ids.min())} to {int(ids.max())} of a "
            f"cache that has {blocks}"
        )

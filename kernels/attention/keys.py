"""Keys and values read out of a cache that an operator cannot read where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.attention.batch import Batch

# A block size that every operator takes.
BLOCK = 128
_MOST_TOKENS_IN_BLOCK, _ALIGNMENT = 1024, 16


def is_viewable(cache: Tensor) -> bool:
    """Whether [blocks, size, heads, dim] is, as it lies, [blocks, size, heads * dim] for TND."""
    size: int = cache.shape[1]
    return bool(cache.is_contiguous()) and size % _ALIGNMENT == 0 and size <= _MOST_TOKENS_IN_BLOCK


def paged(key_cache: Tensor, value_cache: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Caches [blocks, size, heads * dim] and the block table [requests, blocks] into them.

    A view where the operator can read the cache as it lies. Where it cannot (blocks-first caches of
    hybrid models hold a block's keys and values side by side; a block of more than 1024 tokens, or
    of no multiple of 16) what the requests hold is copied into blocks of 128.
    """
    if is_viewable(key_cache) and is_viewable(value_cache):
        return key_cache.flatten(2), value_cache.flatten(2), batch.rows
    size = key_cache.shape[1]
    found = batch.derived.get(("copied", size))
    if found is None:
        found = batch.derived["copied", size] = _copied_layout(batch, size)
    blocks, offsets, table = found
    shape = (-1, BLOCK, key_cache.shape[2:].numel())
    key, value = (cache[blocks, offsets].view(shape) for cache in (key_cache, value_cache))
    return key, value, table


def _copied_layout(batch: Batch, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token of the copy is (block, offset), and the copy's block table."""
    rows = batch.rows
    lens = torch.tensor(batch.kv_lens)
    counts = (lens + BLOCK - 1) // BLOCK
    ends = counts.cumsum(0)
    table = (ends - counts)[:, None] + torch.arange(max(int(counts.max()), 1))
    # Past its own blocks a row repeats its first one: it is never read, but must be in range.
    table = torch.where(torch.arange(table.shape[1]) < counts[:, None], table, 0)
    requests = torch.repeat_interleave(torch.arange(len(lens)), counts * BLOCK)
    positions = torch.arange(len(requests)) - ((ends - counts) * BLOCK)[requests]
    # The rest of a request's last block is filled with its first token.
    positions = torch.where(positions < lens[requests], positions, 0)
    requests, positions, table = (x.to(rows.device) for x in (requests, positions, table))
    return rows[requests, positions // size], positions % size, table.int()


def of_request(cache: Tensor, batch: Batch, request: int, start: int, stop: int) -> Tensor:
    """Keys (or values) of one request from position ``start`` to ``stop``: [tokens, heads, dim]."""
    positions = torch.arange(start, stop, device=cache.device)
    size = cache.shape[1]
    return cache[batch.rows[request, positions // size], positions % size]


def last_of(
    key_cache: Tensor, value_cache: Tensor, batch: Batch, requests: list[int], window: int
) -> tuple[Tensor, Tensor, list[int]]:
    """The last ``window`` keys and values of some requests: [requests, longest, heads, dim] each.

    Returns:
        The keys, the values, and how many of each request's are its own; the rest repeats the last.
    """
    lens = [min(window, batch.kv_lens[request]) for request in requests]
    size = key_cache.shape[1]
    name = ("last", size, window, tuple(requests))
    found = batch.derived.get(name)
    if found is None:
        ends = torch.tensor([batch.kv_lens[request] for request in requests])
        first = ends - torch.tensor(lens)
        positions = first[:, None] + torch.arange(max(1, *lens))
        positions = positions.minimum(ends[:, None] - 1).clamp_min(0).to(key_cache.device)
        rows = batch.rows[torch.tensor(requests, device=key_cache.device)]
        blocks = rows.gather(1, positions // size)
        found = batch.derived[name] = (blocks, positions % size)
    return key_cache[found], value_cache[found], lens

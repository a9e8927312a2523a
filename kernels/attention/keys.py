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


def paged(caches: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Caches [blocks, size, heads * dim] and the block table [requests, blocks] into them.

    A view where the operator can read the cache as it lies. Where it cannot (blocks-first caches of
    hybrid models hold a block's keys and values side by side; a block of more than 1024 tokens, or
    of no multiple of 16) what the requests hold is copied into blocks of 128.
    """
    key_cache, value_cache = caches
    if is_viewable(key_cache) and is_viewable(value_cache):
        return key_cache.flatten(2), value_cache.flatten(2), batch.rows
    size = key_cache.shape[1]
    found = batch.derived.get(("copied", size))
    if found is None:
        found = batch.derived["copied", size] = _copied_layout(batch, size)
    blocks, offsets, table = found
    shape = (-1, BLOCK, key_cache.shape[2:].numel())
    key, value = (cache[blocks, offsets].view(shape) for cache in caches)
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


def of_request(
    caches: tuple[Tensor, Tensor], batch: Batch, request: int, first: int
) -> tuple[Tensor, Tensor]:
    """One request's keys and values from position ``first`` on: [tokens, heads, dim] each."""
    size = caches[0].shape[1]
    name = ("of request", size, request, first)
    found = batch.derived.get(name)
    if found is None:
        positions = torch.arange(first, batch.kv_lens[request], device=caches[0].device)
        where = batch.rows[request, positions // size], positions % size
        found = batch.derived[name] = where
    key, value = (cache[found] for cache in caches)
    return key, value


def last_of(
    caches: tuple[Tensor, Tensor], batch: Batch, requests: list[int], window: int
) -> tuple[Tensor, Tensor, list[int]]:
    """The last ``window`` keys and values of some requests: [requests, longest, heads, dim] each.

    Returns:
        The keys, the values, and how many of each request's are its own; the rest repeats the last.
    """
    size = caches[0].shape[1]
    name = ("last", size, window)
    found = batch.derived.get(name)
    if found is None:
        device = caches[0].device
        ends = [batch.kv_lens[request] for request in requests]
        lens = [min(window, end) for end in ends]
        last = torch.tensor(ends)[:, None] - 1
        positions = last + 1 - torch.tensor(lens)[:, None] + torch.arange(max(1, *lens))
        positions = positions.minimum(last).clamp_min(0).to(device)
        rows = batch.rows[torch.tensor(requests, device=device)]
        blocks = rows.gather(1, positions // size)
        found = batch.derived[name] = (blocks, positions % size), lens
    where, lens = found
    key, value = (cache[where] for cache in caches)
    return key, value, lens

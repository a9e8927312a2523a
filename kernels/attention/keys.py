"""Keys and values of the cache as an operator can read them: a view, or a copy where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.attention.batch import Batch
from ascend_patch.kernels.attention.table import is_pageable

# A block size that every operator takes, in every layout.
BLOCK = 128


def paged(caches: tuple[Tensor, Tensor], batch: Batch, *, tnd: bool) -> tuple[Tensor, ...]:
    """Caches [blocks, size, heads * dim] and the block table [requests, blocks] into them.

    A view where the operator can read the cache as it lies. Where it cannot (blocks-first caches of
    hybrid models hold a block's keys and values side by side; and see ``table.is_pageable``) what
    the requests hold is copied into blocks of 128.
    """
    size: int = caches[0].shape[1]
    readable = is_pageable(size, tnd=tnd, head_size=caches[0].shape[-1])
    if readable and all(cache.is_contiguous() for cache in caches):
        return caches[0].flatten(2), caches[1].flatten(2), batch.rows
    found = batch.derived.get(("copied", size))
    if found is None:
        found = batch.derived["copied", size] = _copied_layout(batch, size)
    blocks, offsets, table = found
    shape = (-1, BLOCK, caches[0].shape[2:].numel())
    key, value = (cache[blocks, offsets].view(shape) for cache in caches)
    return key, value, table


def _copied_layout(batch: Batch, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each token of the copy is (block, offset), and the copy's block table."""
    rows = batch.rows
    lens = torch.tensor(batch.kv_lens)
    counts = (lens + BLOCK - 1) // BLOCK
    ends = counts.cumsum(0)
    columns = torch.arange(max(int(counts.max()), 1))
    # Past its own blocks a row names block 0: it is never read, but must be in range.
    table = torch.where(columns < counts[:, None], (ends - counts)[:, None] + columns, 0)
    requests = torch.repeat_interleave(torch.arange(len(lens)), counts * BLOCK)
    positions = torch.arange(len(requests)) - ((ends - counts) * BLOCK)[requests]
    # The rest of a request's last block is filled with its first token.
    positions = torch.where(positions < lens[requests], positions, 0)
    requests, positions, table = (x.to(rows.device) for x in (requests, positions, table))
    return rows[requests, positions // size], positions % size, table.int()


def last_of(
    caches: tuple[Tensor, Tensor], batch: Batch, requests: list[int], window: int
) -> tuple[Tensor, Tensor, list[int]]:
    """The last ``window`` keys and values of some requests: [requests, longest, heads * dim] each.

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
    key, value = (cache[where].flatten(2) for cache in caches)
    return key, value, lens

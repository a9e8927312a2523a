"""Keys and values of one request out of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(cache: Tensor, table: Tensor, seen: slice, kv_heads: int, heads_first: bool) -> Tensor:
    """Rows ``seen`` of one request's keys or values.

    Args:
        cache: [blocks, block_size, H] or [blocks, block_size, KV_N, D], or with ``heads_first``
            [blocks, KV_N, block_size, D].
        table: [entries], the request's row of the block table; what lies beyond the blocks of
            ``seen`` may hold anything and is not read.

    Returns:
        [rows, KV_N, D].
    """
    size = cache.shape[2] if heads_first else cache.shape[1]
    first, last = seen.start // size, -(-seen.stop // size)
    blocks = cache.index_select(0, table[first:last].to(torch.int64))
    if heads_first:
        blocks = blocks.transpose(1, 2)
    width = cache[0].numel() // (size * kv_heads)
    rows = blocks.reshape((last - first) * size, kv_heads, width)
    return rows[seen.start - first * size : seen.stop - first * size]

"""merge_head_shards_ in torch operators: any device, any dtype, exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ascend_patch.kernels.kv_layout.merge import MergeCall

# Of one gathered copy; a long request is done in several.
MOST_BYTES = 256 << 20


def run(call: MergeCall) -> None:
    """Gather, concatenate the heads, scatter; a copy of some blocks of one part at a time."""
    device = call.caches[0].device
    ids = torch.tensor(call.block_ids, device=device)
    source_ids = torch.tensor(call.source_ids, device=device)
    for cache, source in zip(call.caches, call.sources, strict=True):
        block = cache.shape[1] * cache.shape[2] * cache.shape[3] * cache.element_size()
        step = max(1, MOST_BYTES // max(block, 1))
        for where, at in zip(source_ids.split(step), ids.split(step), strict=True):
            cache[at] = merged(source[where], call.shards)


def merged(blocks: Tensor, shards: tuple[int, ...]) -> Tensor:
    """Blocks [n, block_size, H, W] of shards one behind the other, as blocks of tokens."""
    count, tokens, _, width = blocks.shape
    flat = blocks.reshape(count, -1)
    parts = flat.split([tokens * heads * width for heads in shards], dim=1)
    return torch.cat(
        [part.view(count, tokens, heads, width) for part, heads in zip(parts, shards, strict=True)],
        dim=2,
    )

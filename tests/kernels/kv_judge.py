"""Is a merge right? Every byte of the memory is compared, with numpy and a loop over tokens."""

from __future__ import annotations

import numpy as np
import torch

from ascend_patch.kernels import kv_layout
from ascend_patch.kernels.kv_layout.cases import MergeCase, make_inputs


def memory_of(cache: torch.Tensor) -> np.ndarray:
    """All bytes of a tensor's storage, gaps included."""
    whole = torch.empty(0, dtype=torch.uint8, device=cache.device)
    whole.set_(cache.untyped_storage())
    return whole.cpu().numpy().copy()


def merged(block: np.ndarray, shards: tuple[int, ...], tokens: int, row: int) -> np.ndarray:
    """A block's bytes, token by token and head by head."""
    out, start = np.full_like(block, 0x5A), 0
    heads = sum(shards)
    first = 0
    for count in shards:
        for token in range(tokens):
            for head in range(count):
                at = start + (token * count + head) * row
                to = (token * heads + first + head) * row
                out[to : to + row] = block[at : at + row]
        start += tokens * count * row
        first += count
    return out


def wrong_bytes(case: MergeCase, seed: int, device: str = "cpu", run=None) -> int:
    """Bytes that differ after ``run`` (by default merge_head_shards_) did a case."""
    caches, ids, staging = make_inputs(case, seed, device)
    parts = (0, 1) if case.combined else (None,)
    before = [memory_of(x) for x in caches]
    sources = [memory_of(x) for x in staging or ()]
    row = case.width * caches[0].element_size()
    size = case.block_size * case.heads * row
    options = {"staging": staging, "parts_dim": 1 if case.combined else None}
    (run or kv_layout.merge_head_shards_)(caches, ids, case.shards, **options)
    wrong = 0
    for number, cache in enumerate(caches):
        want, step = before[number].copy(), cache.stride(0) * cache.element_size()
        for i, block in enumerate(ids):
            for part, _ in enumerate(parts):
                at = block * step + part * size
                origin, start = (sources[number], i * step) if staging else (before[number], None)
                start = at if start is None else start + part * size
                shards = origin[start : start + size]
                want[at : at + size] = merged(shards, case.shards, case.block_size, row)
        wrong += int((memory_of(cache) != want).sum())
    wrong += sum(
        int((memory_of(x) != y).sum()) for x, y in zip(staging or (), sources, strict=True)
    )
    return wrong

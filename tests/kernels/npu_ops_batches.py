"""Random batches for the attention operators, in every layout, over caches full of NaN."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

MASK = torch.triu(torch.ones(2048, 2048), 1).to(torch.int8)


@dataclass
class Shape:
    """What a batch is like; lengths are per request, of queries and of keys."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    width: int = 128
    value_width: int = 0
    dtype: str = "float32"
    layout: str = "TND"
    block_size: int = 0  # 0: not paged
    heads_first: bool = False
    seed: int = 0

    def __post_init__(self):
        self.value_width = self.value_width or self.width


@dataclass
class Made:
    """Tensors as an operator takes them, and each request's own as numpy arrays [S, N, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    queries: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    values: list = field(default_factory=list)
    block_table: torch.Tensor | None = None


def numbers(rng, *shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(getattr(torch, dtype))


def plain(x):
    """A tensor as float64 numpy."""
    return x.double().numpy()


def make(shape: Shape) -> Made:
    rng = np.random.default_rng(shape.seed)
    parts = [
        numbers(rng, rows, shape.heads, shape.width, dtype=shape.dtype) for rows in shape.query_lens
    ]
    query = lay_out(parts, shape.layout)
    if shape.block_size:
        key, value, table, keys, values = paged(rng, shape)
    else:
        keys, values = (
            [numbers(rng, n, shape.kv_heads, width, dtype=shape.dtype) for n in shape.kv_lens]
            for width in (shape.width, shape.value_width)
        )
        key, value, table = lay_out(keys, shape.layout), lay_out(values, shape.layout), None
    each = ([plain(x) for x in some] for some in (parts, keys, values))
    return Made(query, key, value, *each, table)


def lay_out(parts, layout):
    """[S, N, D] of each request into one tensor; what belongs to no request is NaN."""
    layout = layout.partition("_")[0]
    if layout in ("TND", "NTD"):
        whole = torch.cat(parts)
        return whole.transpose(0, 1).contiguous() if layout == "NTD" else whole
    longest = max(1, *(len(x) for x in parts))
    whole = parts[0].new_full((len(parts), longest, *parts[0].shape[1:]), float("nan"))
    for row, x in zip(whole, parts, strict=True):
        row[: len(x)] = x
    if layout == "BSH":
        return whole.flatten(2)
    if layout == "SBH":
        return whole.flatten(2).transpose(0, 1).contiguous()
    return whole.transpose(1, 2).contiguous() if layout == "BNSD" else whole


def taken_apart(out, lens, layout, heads):
    """What an operator returned, as [S, N, D] of each request, float64."""
    out = out.double()
    if layout == "SBH":
        out = out.transpose(0, 1)
    if layout in ("BSH", "SBH"):
        out = out.unflatten(-1, (heads, -1))
    if layout == "BNSD":
        out = out.transpose(1, 2)
    if layout in ("TND", "NTD_TND"):
        return [x.numpy() for x in out.split(list(lens))]
    return [row[:n].numpy() for row, n in zip(out, lens, strict=True)]


def paged(rng, shape):
    """Blocks in random order, some shared, none of them whole, and a table with rubbish in it."""
    size = shape.block_size
    entries = [-(-n // size) for n in shape.kv_lens]
    blocks = sum(entries) + 3
    key, value = (
        torch.full((blocks, size, shape.kv_heads, width), float("nan"))
        for width in (shape.width, shape.value_width)
    )
    dtype = getattr(torch, shape.dtype)
    key, value = key.to(dtype), value.to(dtype)
    free = list(rng.permutation(blocks))
    rubbish = np.array([-1, blocks, 2**31 - 1, -(2**31)])
    table = rng.choice(rubbish, (len(entries), max(entries, default=0) + 2)).astype(np.int32)
    for request, length in enumerate(shape.kv_lens):
        for entry in range(entries[request]):
            shared = request and entry < entries[request - 1] and rng.random() < 0.5
            block = table[request - 1, entry] if shared else free.pop()
            table[request, entry] = block
            rows = min(size, length - entry * size)
            for cache, width in ((key, shape.width), (value, shape.value_width)):
                new = numbers(rng, rows, shape.kv_heads, width, dtype=shape.dtype)
                there = cache[block, :rows]
                cache[block, :rows] = torch.where(there.isnan(), new, there)
    found = tuple(
        [
            torch.cat([cache[table[r, e]] for e in range(entries[r])] or [cache[0, :0]])[:n]
            for r, n in enumerate(shape.kv_lens)
        ]
        for cache in (key, value)
    )
    if shape.heads_first:
        key, value = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
    else:
        key, value = key.flatten(2), value.flatten(2)
    return key, value, torch.from_numpy(table), *found

"""Calls of fused inference attention that it takes, for tests to change in one place."""

from __future__ import annotations

import torch
from npu_ops_batches import MASK

BF16 = torch.bfloat16
RENAMED = {
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
}


def dense(layout="TND", *, heads=8, kv_heads=2, width=128, rows=6, columns=6, **options):
    """Two requests without a cache, causal."""
    sizes = {"T": 2 * rows, "B": 2, "S": rows, "N": heads, "D": width, "H": heads * width}
    kv_sizes = {**sizes, "T": 2 * columns, "S": columns, "N": kv_heads, "H": kv_heads * width}
    letters = layout.partition("_")[0]
    query = torch.randn(*(sizes[x] for x in letters), dtype=BF16)
    key, value = torch.randn(2, *(kv_sizes[x] for x in letters), dtype=BF16)
    ragged = "T" in letters
    return {
        "query": query,
        "key": key,
        "value": value,
        "atten_mask": MASK,
        "actual_seq_lengths": [rows, 2 * rows] if ragged else [rows, rows],
        "actual_seq_lengths_kv": [columns, 2 * columns] if ragged else [columns, columns],
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": width**-0.5,
        "input_layout": layout,
        "sparse_mode": 3,
        **options,
    }


def paged(layout="TND", *, heads=8, kv_heads=2, width=128, size=128, blocks=8, rows=6, **options):
    """Two requests of 200 and 100 tokens in blocks."""
    call = dense(layout, heads=heads, kv_heads=kv_heads, width=width, rows=rows)
    if options.pop("heads_first", False):
        shape = (blocks, kv_heads, size, width)
    else:
        shape = (blocks, size, kv_heads * width)
    entries = -(-200 // size)
    table = torch.full((2, entries + 1), -1, dtype=torch.int32)
    table[0, :entries] = torch.arange(entries) % blocks
    table[1, : -(-100 // size)] = torch.arange(-(-100 // size)) % blocks
    cache = torch.randn(2, *shape, dtype=BF16)
    return {
        **call,
        "key": cache[0],
        "value": cache[1],
        "block_table": table,
        "block_size": size,
        "actual_seq_lengths_kv": [200, 100],
        **options,
    }


def second(call):
    """The same call of the second version."""
    return {RENAMED.get(name, name): value for name, value in call.items()}


def int8(**options):
    """A decode step over int8 keys, as C8 makes it."""
    call = paged("BNSD", rows=1, atten_mask=None, sparse_mode=0)
    for name in ("key", "value"):
        call[name] = torch.randint(-128, 128, call[name].shape, dtype=torch.int8)
        call[f"{name}_antiquant_scale"] = torch.rand(1, 2, 1, 128).to(BF16)
    return {**call, **options}


def strided(x):
    return torch.cat((x, x), -1)[..., : x.shape[-1]]

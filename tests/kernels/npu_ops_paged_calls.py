"""How tests call ATB's attention operators."""

from __future__ import annotations

import torch

HIDES = {"float16": float("-inf"), "bfloat16": 1.0, "float32": 1.0}


def upper(side, dtype):
    """The mask that hosts and tests give: what hides a column above the diagonal, 0 elsewhere."""
    hidden = torch.triu(torch.ones(side, side, dtype=torch.bool), 1)
    return torch.zeros(side, side, dtype=getattr(torch, dtype)).masked_fill(hidden, HIDES[dtype])


def lens(values):
    return torch.tensor(values, dtype=torch.int32)


def caches(made, shape):
    """[blocks, block_size, H] as ATB wants it: heads apart."""
    return [x.unflatten(2, (shape.kv_heads, -1)) for x in (made.key, made.value)]

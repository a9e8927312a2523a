"""The rotary embedding of vllm-ascend's own library (0.13.0 and older)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> tuple[Tensor, Tensor]:
    """(query, key) with each head's first dimensions rotated, as many as the cache is wide.

    Args:
        positions: [T], rows of the cache.
        query, key: [T, heads * head_size]; they stay as they are.
        cos_sin_cache: [positions, width], cosines before sines.
        is_neox: Whether a pair is (i, i + width / 2), and not (2i, 2i + 1).
    """
    name, width = "rotary_embedding", cos_sin_cache.shape[-1]
    require(width <= head_size, name, f"the cache is {width} wide and a head has {head_size}")
    cos, sin = cos_sin_cache[positions.flatten().long()].float()[:, None].chunk(2, -1)
    rotated = []
    for x in (query, key):
        heads = x.reshape(-1, x.shape[-1] // head_size, head_size).clone()
        part = heads[..., :width]
        pairs = part.chunk(2, -1) if is_neox else (part[..., ::2], part[..., 1::2])
        a, b = (half.float() for half in pairs)
        halves = (a * cos - b * sin), (b * cos + a * sin)
        out = torch.cat(halves, -1) if is_neox else torch.stack(halves, -1).flatten(-2)
        heads[..., :width] = out.to(x.dtype)
        rotated.append(heads.reshape(x.shape))
    return rotated[0], rotated[1]


KERNELS: dict[str, Callable[..., Any]] = {"_C_ascend::rotary_embedding": rotary_embedding}

"""vLLM's RotaryEmbedding, through the bundled kernel."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch

from ascend_patch.impl.left_to_host import count_traced
from ascend_patch.kernels.rope import rotary_embedding

PATCH = "rotary"
NOT_TAKEN = "query, key or positions of a device, rank or dtype that the kernel does not take"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Where the operators have been seen to run; elsewhere (ROCm, which is `cuda` to torch, and XPU) the
# layers stay as they are.
DEVICES = ("cpu", "npu") if torch.version.hip else ("cpu", "cuda", "npu")


def forward(original: FunctionType) -> Any:
    """RotaryEmbedding.forward_native from 0.16 on: fresh outputs for any layout of q and k."""

    def forward(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if not takes(positions, query, key, self.head_size):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, positions, query, key)
        cache = self._match_cos_sin_cache_dtype(query)
        return rotate(self, cache, positions, query, key)

    return forward


def forward_before_0_16(original: FunctionType) -> Any:
    """RotaryEmbedding.forward_native up to 0.15, which reads the layer's cache as it lies there.

    `_match_cos_sin_cache_dtype` of these releases writes to the layer, which a compiled forward
    had better not.
    """

    def forward_native(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if not takes(positions, query, key, self.head_size):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, positions, query, key)
        return rotate(self, self.cos_sin_cache, positions, query, key)

    return forward_native


def forward_cpu(original: FunctionType) -> Any:
    """RotaryEmbedding.forward_cpu, from 0.14 on.

    It is functional to its callers, which use what is returned; the release's in-place update is an
    implementation detail that vLLM's other backends do not share. Subclasses inherit it also where
    their forward_native is their own (FourierRotaryEmbedding, XDRotaryEmbedding): the original.
    """
    base = original.__globals__["RotaryEmbedding"]

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        if type(self).forward_native is not base.forward_native:
            return original(self, positions, query, key)
        if not takes(positions, query, key, self.head_size):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, positions, query, key)
        return rotate(self, cache_of(self, query), positions, query, key)

    return forward_cpu


def rotate(layer: Any, cache: Any, positions: Any, query: Any, key: Any) -> Any:
    """(query, key), rotated by the rows of a cache [rows, rotary_dim] in the layer's style."""
    return rotary_embedding(
        positions,
        query,
        key,
        cache,
        head_size=layer.head_size,
        is_neox_style=layer.is_neox_style,
    )


def cache_of(layer: Any, query: Any) -> Any:
    """The layer's cos_sin_cache on query's device and in its dtype, as the release has it made.

    From 0.16 on the release returns it; before, it is put on the layer, and nothing returned.
    """
    matched = layer._match_cos_sin_cache_dtype(query)
    return layer.cos_sin_cache if matched is None else matched


def takes(positions: Any, query: Any, key: Any, head_size: int) -> bool:
    """Whether the kernel's API covers a call: [T, heads * head_size] or [T, heads, head_size].

    Only devices, ranks and dtypes decide, so that a traced call decides once. The releases reshape
    whatever has T * heads * head_size elements.
    """
    if query.device.type not in DEVICES or query.dtype not in DTYPES:
        return False
    if key is not None and key.dtype != query.dtype:
        return False
    by_head = query.dim() == 3 and query.shape[2] == head_size and positions.dim() == 1
    return bool(by_head or query.dim() == 2)

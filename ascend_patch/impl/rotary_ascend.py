"""vllm-ascend's RoPE, where the release computes it wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import left_to_host
from ascend_patch.kernels.rope import rotary_embedding

PATCH = "rotary"
WITH_OFFSETS = "offsets of positions, which the kernel does not take, where the release is wrong"
MODULE = "vllm_ascend.ops.rotary_embedding"


def reads_wrong_angles(original: FunctionType, positions: Tensor, rotary_dim: int) -> bool:
    """Whether the release's Triton kernel takes angles from a wrong place in the cache.

    It starts the sine half at half of rotary_dim rounded up to a power of two, so that 96 reads
    column 64 where the sines begin at 48; and it takes positions to lie side by side. Without
    Triton the release calls torch_npu, which is right.
    """
    has_triton = bool(original.__globals__["HAS_TRITON"])
    power_of_two = rotary_dim & (rotary_dim - 1) == 0
    return has_triton and not (power_of_two and positions.is_contiguous())


def fits_whole(query_heads: int, key_heads: int, rotary_dim: int, is_neox_style: bool) -> bool:
    """Whether all heads of a token fit a vector core's memory, as 0.18.0's kernel takes them.

    What triton-ascend 3.2.0 compiles for Ascend910B and 910_93; heads are rounded up to a power of
    two, and beyond these sizes it ends in `ub overflow`, at the first call.
    """
    queries, keys = (1 << (heads - 1).bit_length() for heads in (query_heads, key_heads))
    half = rotary_dim // 2
    if is_neox_style:
        return (queries + keys) * half <= 12288
    return max(queries, keys) * half <= 2048


def fits_tiled(_query_heads: int, _key_heads: int, rotary_dim: int, is_neox_style: bool) -> bool:
    """The same of 0.23.0's kernel, which takes 64 heads at a time, and 32 in GPT-J style."""
    return rotary_dim <= (256 if is_neox_style else 128)


def rope_forward_oot(original: FunctionType) -> Any:
    """`vllm::npu_rotary_embedding` (0.18.0) and `vllm::rope_forward_oot` (releases/v0.13.0)."""
    return _operator(original, fits_whole)


def rope_forward_oot_tiled(original: FunctionType) -> Any:
    """`vllm::npu_rotary_embedding` of 0.23.0."""
    return _operator(original, fits_tiled)


def _operator(original: FunctionType, fits: Callable[[int, int, int, bool], bool]) -> Any:
    """No tokens are ours too: the release asks torch for a view of nothing by `-1`, an error."""

    def rope_forward_oot(
        positions: Any,
        query: Any,
        key: Any,
        cos_sin_cache: Any,
        head_size: int,
        rotary_dim: int,
        is_neox_style: bool,
        offsets: Any = None,
    ) -> Any:
        q_heads, k_heads = (x.shape[1:].numel() // head_size for x in (query, key))
        wrong = reads_wrong_angles(original, positions, rotary_dim)
        if original.__globals__["HAS_TRITON"]:
            wrong = wrong or not fits(q_heads, k_heads, rotary_dim, is_neox_style)
        if offsets is None and (wrong or query.shape[0] == 0):
            return rotary_embedding(
                positions,
                query,
                key,
                cos_sin_cache,
                head_size=head_size,
                is_neox_style=is_neox_style,
            )
        if wrong:
            left_to_host.count_traced(PATCH, WITH_OFFSETS)
        return original(
            positions, query, key, cos_sin_cache, head_size, rotary_dim, is_neox_style, offsets
        )

    return rope_forward_oot


# Set on a layer when it is built; see `remember_whose_tables`.
OWN_TABLES = "_ascend_patch_has_own_tables"


def remember_whose_tables(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """0.13.0: note at construction whether a layer's tables are those that the release shares.

    The first layer that is built records its cache in a global, and every step gathers cos and sin
    from it for all layers. Later the identity is lost where a cache is cast, so it is asked now.
    """
    wrapped(*args, **kwargs)
    shared = sys.modules[MODULE]._cos_sin_cache
    setattr(instance, OWN_TABLES, instance.cos_sin_cache is not shared)


def rope_forward_oot_0_13(original: FunctionType) -> Any:
    """`_rope_forward_oot` of 0.13.0: a layer with tables of its own gets them.

    A draft model, or a second kind of layer, has another base or scaling than the layer that came
    first; the release rotates it by that one's angles. A layer without keys of its own (key None)
    is ours as well. Everything else, and with it the operator that the release's fusion pass looks
    for, stays as it is.
    """

    def _rope_forward_oot(
        self: Any, positions: Any, query: Any, key: Any, is_neox_style: bool, offsets: Any = None
    ) -> Any:
        would_share = (
            is_neox_style and self.head_size == 128 and self.cos_sin_cache.shape[-1] == 128
        )
        own = would_share and getattr(self, OWN_TABLES, False)
        if offsets is None and (own or key is None):
            return rotary_embedding(
                positions,
                query,
                key,
                self.cos_sin_cache.to(query.device),
                head_size=self.head_size,
                is_neox_style=is_neox_style,
            )
        if own:
            left_to_host.count_traced(PATCH, WITH_OFFSETS)
        return original(self, positions, query, key, is_neox_style, offsets)

    return _rope_forward_oot


def rope_forward_oot_0_11(original: FunctionType) -> Any:
    """`_rope_forward_oot` of 0.11.0: a head of which only a part turns, and a layer without keys.

    The release cuts that part out and then tells torch_npu that a head is as wide as before, which
    the kernel behind it refuses in GPT-J style (in NeoX style it takes the width from the angles).
    Its own operator does the work here too, told the truth.
    """
    release = original.__globals__
    npu, is_310p = release["torch_npu"], release["is_310p"]
    takes_custom_kernel = release["_custom_rotary_embedding_enabled"]

    def _rope_forward_oot(
        self: Any, positions: Any, query: Any, key: Any, is_neox_style: bool, offsets: Any = None
    ) -> Any:
        empty = key is None or query.shape[0] == 0
        by_kernel = takes_custom_kernel(query, is_neox_style, self.head_size) and not is_310p()
        # Set where cosines and sines are gathered once a step, for NeoX style and whole heads.
        gathered = getattr(self, "cos", None) is not None
        if offsets is None and (empty or (gathered and not is_neox_style and not by_kernel)):
            return rotary_embedding(
                positions,
                query,
                key,
                self.cos_sin_cache.to(query.device),
                head_size=self.head_size,
                is_neox_style=is_neox_style,
            )
        whole = self.rotary_dim == self.head_size
        if offsets is not None and not (by_kernel or gathered or whole):
            left_to_host.count_traced(PATCH, WITH_OFFSETS)
        if by_kernel or offsets is not None or gathered or whole:
            return original(self, positions, query, key, is_neox_style, offsets)
        cache = self.cos_sin_cache.to(query.device, query.dtype)
        heads = [x.view(x.shape[0], -1, self.head_size) for x in (query, key)]
        turned = [x[..., : self.rotary_dim].flatten(1).contiguous() for x in heads]
        # In place, on the parts that were cut out.
        npu._npu_rotary_embedding(positions, *turned, self.rotary_dim, cache, is_neox_style)
        parts = [x.view(x.shape[0], -1, self.rotary_dim) for x in turned]
        q, k = (
            torch.cat((part, x[..., self.rotary_dim :]), dim=-1)
            for part, x in zip(parts, heads, strict=True)
        )
        return q.view(query.shape), k.view(key.shape)

    return _rope_forward_oot

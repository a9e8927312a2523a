"""vllm-ascend's RoPE, where the release computes it wrong."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from ascend_patch.kernels.rope import rotary_embedding


def reads_wrong_sines(original: FunctionType, rotary_dim: int) -> bool:
    """Whether the release's Triton kernel takes sines from a wrong place in the cache.

    It starts the sine half at half of rotary_dim rounded up to a power of two, so that 96 reads
    column 64 where the sines begin at 48. Without Triton the release calls torch_npu, which is
    right.
    """
    has_triton = bool(original.__globals__["HAS_TRITON"])
    return has_triton and rotary_dim & (rotary_dim - 1) != 0


def rope_forward_oot(original: FunctionType) -> Any:
    """`vllm::npu_rotary_embedding` (0.18.0) and `vllm::rope_forward_oot` (releases/v0.13.0)."""

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
        if offsets is None and reads_wrong_sines(original, rotary_dim):
            return rotary_embedding(
                positions,
                query,
                key,
                cos_sin_cache,
                head_size=head_size,
                is_neox_style=is_neox_style,
            )
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
    shared = wrapped.__func__.__globals__["_cos_sin_cache"]
    setattr(instance, OWN_TABLES, instance.cos_sin_cache is not shared)


def rope_forward_oot_0_13(original: FunctionType) -> Any:
    """`_rope_forward_oot` of 0.13.0: a layer with tables of its own gets them.

    A draft model, or a second kind of layer, has another base or scaling than the layer that came
    first; the release rotates it by that one's angles. Everything else, and with it the operator
    that the release's fusion pass looks for, stays as it is.
    """

    def _rope_forward_oot(
        self: Any, positions: Any, query: Any, key: Any, is_neox_style: bool, offsets: Any = None
    ) -> Any:
        would_share = (
            is_neox_style and self.head_size == 128 and self.cos_sin_cache.shape[-1] == 128
        )
        if offsets is None and would_share and getattr(self, OWN_TABLES, False):
            return rotary_embedding(
                positions,
                query,
                key,
                self.cos_sin_cache,
                head_size=self.head_size,
                is_neox_style=is_neox_style,
            )
        return original(self, positions, query, key, is_neox_style, offsets)

    return _rope_forward_oot

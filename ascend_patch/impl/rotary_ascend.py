"""vllm-ascend's registered RoPE operator, where the release computes it wrong."""

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

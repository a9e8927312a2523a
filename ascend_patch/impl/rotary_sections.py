"""vLLM's MRotaryEmbedding (Qwen2-VL, Qwen3-VL, GLM-4.1V), through the bundled kernel."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from ascend_patch.impl.left_to_host import count_traced
from ascend_patch.impl.rotary import NOT_TAKEN, PATCH, cache_of, takes
from ascend_patch.kernels.rope import rotary_embedding

AXES = 3


def forward(original: FunctionType) -> Any:
    """MRotaryEmbedding.forward_native, which forward_cpu calls in every release.

    positions are [T] for text, or [3, T] (time, height, width). As in the releases, `offsets` has
    no effect.
    """

    def forward_native(
        self: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None
    ) -> Any:
        if not has_sections(self, positions) or not takes(positions, query, key, self.head_size):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, positions, query, key, offsets)
        return rotary_embedding(
            positions,
            query,
            key,
            cache_of(self, query),
            head_size=self.head_size,
            is_neox_style=self.is_neox_style,
            **sections(self, positions),
        )

    return forward_native


def forward_cuda(original: FunctionType) -> Any:
    """MRotaryEmbedding.forward_cuda up to 0.26: layers whose pairs are adjacent (GPT-J).

    The Triton kernel of these releases takes no style and rotates NeoX pairs, so that GLM-4.1V is
    rotated wrongly wherever custom operators are on (`--enforce-eager`). 0.27 gave it the style.
    """
    ours = forward(original)

    def forward_cuda(
        self: Any, positions: Any, query: Any, key: Any = None, offsets: Any = None
    ) -> Any:
        if positions.dim() == 2 and not self.is_neox_style:
            return ours(self, positions, query, key, offsets)
        return original(self, positions, query, key, offsets)

    return forward_cuda


def has_sections(layer: Any, positions: Any) -> bool:
    """Whether the layer can turn these positions into angles: those of text need no sections."""
    if positions.dim() == 1:
        return True
    return positions.dim() == 2 and layer.mrope_section and len(layer.mrope_section) == AXES


def sections(layer: Any, positions: Any) -> dict[str, Any]:
    """How rotary_embedding has to read these positions of an MRotaryEmbedding."""
    if positions.dim() == 1:
        return {}
    return {
        "mrope_section": layer.mrope_section,
        "mrope_interleaved": layer.mrope_interleaved,
    }

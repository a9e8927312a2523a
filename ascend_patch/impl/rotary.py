"""vLLM's RotaryEmbedding, through the bundled kernel."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from ascend_patch.kernels.rope import rotary_embedding


def forward(_original: FunctionType) -> Any:
    """RotaryEmbedding.forward_native and forward_cpu: fresh outputs for any layout of q and k.

    Both are functional to their callers, which use what is returned; forward_cpu's in-place
    update is an implementation detail that vLLM's other backends do not share.
    """

    def forward(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        return rotary_embedding(
            positions,
            query,
            key,
            self._match_cos_sin_cache_dtype(query),
            head_size=self.head_size,
            is_neox_style=self.is_neox_style,
        )

    return forward

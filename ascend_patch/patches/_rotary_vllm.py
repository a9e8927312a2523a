"""patch_rotary in vLLM's own classes: what serves CPU and CUDA machines."""

from __future__ import annotations

from ascend_patch._registry import Band, Target

BASE = "vllm.model_executor.layers.rotary_embedding.base"
COMMON = "vllm.model_executor.layers.rotary_embedding.common"
IMPL = "ascend_patch.impl.rotary"

# What our forward reads of the layer, and what its result must equal.
LAYER = (
    f"{BASE}:RotaryEmbeddingBase.__init__",
    f"{BASE}:RotaryEmbeddingBase._match_cos_sin_cache_dtype",
    f"{BASE}:RotaryEmbedding.__init__",
    f"{BASE}:RotaryEmbedding.forward_static",
    f"{COMMON}:ApplyRotaryEmb.forward_static",
)

BANDS = (
    Band(
        host="vllm",
        versions=">=0.16.0,<0.23.0",
        releases=("0.17.0", "0.18.0"),
        targets=(
            # Eager CPU servers call forward_cpu; compiled ones trace forward_native.
            Target(
                symbol=f"{BASE}:RotaryEmbedding.forward_native",
                seam="traced",
                replacement=f"{IMPL}:forward",
                context=LAYER,
            ),
            Target(
                symbol=f"{BASE}:RotaryEmbedding.forward_cpu",
                seam="traced",
                replacement=f"{IMPL}:forward",
                context=LAYER,
            ),
        ),
    ),
)

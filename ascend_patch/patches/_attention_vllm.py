"""patch_attention_router in vLLM's own classes: the emulated device, a CPU server on an NPU's path.

vLLM's own attention backends take each case right, so that on every other device there is nothing
to change.
"""

from __future__ import annotations

from ascend_patch._registry import Band, Target

BACKEND = "vllm.v1.attention.backend"
REGISTRY = "vllm.v1.attention.backends.registry"
LAYER = "vllm.model_executor.layers.attention.attention"

SELECTION = Target(
    "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
    "host",
    "ascend_patch.impl.attention_vllm:get_attn_backend_cls",
    context=(
        "vllm.v1.attention.selector:AttentionSelectorConfig",
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        f"{REGISTRY}:AttentionBackendEnum",
        f"{REGISTRY}:register_backend",
        f"{BACKEND}:AttentionBackend",
        f"{BACKEND}:AttentionImpl",
        f"{BACKEND}:AttentionMetadataBuilder",
        f"{BACKEND}:AttentionType",
        f"{BACKEND}:CommonAttentionMetadata",
        f"{LAYER}:Attention.__init__",
        f"{LAYER}:Attention.forward",
        f"{LAYER}:get_attention_context",
        f"{LAYER}:unified_attention_with_output",
        f"{LAYER}:unified_kv_cache_update",
    ),
)

BANDS = (
    Band("vllm", "==0.18.0", ("0.18.0",), (SELECTION,), devices=("emulated",)),
    Band(
        "vllm",
        "",
        retired=(
            "vLLM's own attention backends see the KV cache, windows and causality in every batch; "
            "ASCEND_PATCHES_DEVICE=emulated takes an NPU's path instead (vllm 0.18.0, CPU)"
        ),
        devices=("npu", "cuda", "cpu", "rocm", "other"),
    ),
)

UNTOUCHED = (
    "vllm on the emulated device: encoder layers, MLA, and models that no operator takes (heads of "
    "other sizes, fp8 caches, prefix LMs) keep vLLM's own CPU attention; ALiBi and soft caps are "
    "refused when the model is made",
)

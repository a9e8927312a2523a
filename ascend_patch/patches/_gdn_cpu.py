"""patch_gdn_attn on machines without Triton: all that keeps vLLM 0.18 from serving a GDN model."""

from __future__ import annotations

from ascend_patch._registry import Target

IMPL = "ascend_patch.impl.gdn_cpu"
QWEN3_NEXT = "vllm.model_executor.models.qwen3_next"
QWEN3_5 = "vllm.model_executor.models.qwen3_5"
GDN_ATTN = "vllm.v1.attention.backends.gdn_attn"
MAMBA_UTILS = "vllm.v1.worker.mamba_utils"
MODEL_CONFIG = "vllm.model_executor.models.config"

DEVICES = ("cpu", "emulated")


def _host(symbol: str, *context: str) -> Target:
    replacement = f"{IMPL}:{symbol.rpartition(':')[2].rpartition('.')[2].lstrip('_')}"
    return Target(symbol, "host", replacement, context)


# In the order in which a server meets them.
TARGETS = (
    _host(
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        f"{MODEL_CONFIG}:HybridAttentionMambaModelConfig.verify_and_update_config",
        f"{MODEL_CONFIG}:MambaModelConfig.verify_and_update_config",
    ),
    _host("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"),
    _host(
        f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet._forward_core",
        f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet.__init__",
        f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet.forward",
        f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet.rearrange_mixed_qkv",
        f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet._forward_core_decode_non_spec",
        f"{QWEN3_NEXT}:fused_gdn_gating",
        f"{QWEN3_NEXT}:gdn_attention_core",
        f"{QWEN3_5}:Qwen3_5GatedDeltaNet",
    ),
    _host(
        f"{GDN_ATTN}:GDNAttentionMetadataBuilder.build",
        f"{GDN_ATTN}:GDNAttentionMetadata",
        "vllm.v1.attention.backends.utils:split_decodes_and_prefills",
    ),
    _host(
        "vllm.v1.worker.utils:KVBlockZeroer.zero_block_ids",
        "vllm.v1.worker.utils:KVBlockZeroer.init_meta",
        "vllm.v1.worker.utils:_zero_kv_blocks_kernel",
    ),
    _host(
        f"{MAMBA_UTILS}:batch_memcpy",
        f"{MAMBA_UTILS}:batch_memcpy_kernel",
        f"{MAMBA_UTILS}:do_mamba_copy_block",
        f"{MAMBA_UTILS}:collect_mamba_copy_meta",
    ),
)

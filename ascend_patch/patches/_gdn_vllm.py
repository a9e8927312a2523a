"""patch_gdn_attn in vLLM's own classes: what serves CUDA machines, and 0.18 on a CPU."""

from __future__ import annotations

from ascend_patch._registry import Band, Target
from ascend_patch.patches import _gdn_cpu

IMPL = "ascend_patch.impl.gdn_vllm"
BACKENDS = "vllm.v1.attention.backends"
BUILDER = f"{BACKENDS}.gdn_attn:GDNAttentionMetadataBuilder"
QWEN3_NEXT = "vllm.model_executor.models.qwen3_next"
LAYER = f"{QWEN3_NEXT}:Qwen3NextGatedDeltaNet"
LINEAR = "vllm.model_executor.layers.mamba.gdn_linear_attn"
LAYER_0_19 = f"{LINEAR}:GatedDeltaNetAttention"
CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"


def _builder(release: str, *context: str) -> Target:
    return Target(
        f"{BUILDER}.build",
        "host",
        f"{IMPL}:build_{release}",
        (
            f"{BUILDER}.__init__",
            f"{BACKENDS}.gdn_attn:GDNAttentionMetadata",
            f"{BACKENDS}.utils:compute_causal_conv1d_metadata",
            f"{BACKENDS}.utils:split_decodes_and_prefills",
            *context,
        ),
    )


# It does not keep the names of its layers.
BUILDER_INIT = Target(f"{BUILDER}.__init__", "host", "ascend_patch.impl.gdn_begin:remember_layers")

# The block table of a request depends on the mode of prefix caching.
MODES = f"{BACKENDS}.utils:mamba_get_block_table_tensor"


def _layer(layer: str, method: str, replacement: str, *context: str) -> Target:
    return Target(
        f"{layer}.{method}",
        "host",
        f"{IMPL}:{replacement}",
        (
            f"{layer}.__init__",
            f"{layer}.get_state_shape",
            f"{layer}.get_state_dtype",
            f"{layer}.fix_query_key_value_ordering",
            f"{layer}.rearrange_mixed_qkv",
            f"{CONV}:causal_conv1d_fn",
            f"{CONV}:causal_conv1d_update",
            *context,
        ),
    )


def _core(replacement: str, *context: str) -> Target:
    gating = f"{QWEN3_NEXT}:fused_gdn_gating"
    return _layer(LAYER, "_forward_core", replacement, f"{LAYER}.forward", gating, *context)


FLASHINFER = (
    f"{QWEN3_NEXT}:ChunkGatedDeltaRule.__init__",
    "vllm.model_executor.models.qwen3_5:Qwen3_5GatedDeltaNet.forward",
)


def _band(versions: str, releases: str, *targets: Target) -> Band:
    built = (BUILDER_INIT, *targets)
    return Band("vllm", versions, tuple(releases.split()), built, devices=("cuda",))


BANDS = (
    Band(
        "vllm",
        ">=0.18.0,<0.19.0",
        ("0.18.0",),
        _gdn_cpu.TARGETS,
        devices=_gdn_cpu.DEVICES,
    ),
    _band(
        ">=0.11.0,<0.11.1",
        "0.11.0",
        _builder("0_11_0"),
        _layer(LAYER, "_forward", "forward_0_11_0", f"{QWEN3_NEXT}:fused_gdn_gating"),
    ),
    _band(
        ">=0.11.1,<0.13.0",
        "0.11.2 0.12.0",
        _builder("0_11_1"),
        _core("forward_core_0_11"),
    ),
    _band(">=0.13.0,<0.14.0", "0.13.0", _builder("0_13"), _core("forward_core_0_11")),
    _band(">=0.14.0,<0.15.0", "0.14.1", _builder("0_14"), _core("forward_core_0_11")),
    _band(">=0.15.0,<0.16.0", "0.15.1", _builder("0_15", MODES), _core("forward_core_0_11")),
    _band(">=0.16.0,<0.17.0", "0.16.0", _builder("0_15", MODES), _core("forward_core_0_16")),
    _band(
        ">=0.17.0,<0.19.0",
        "0.17.0 0.18.0",
        _builder("0_17", MODES),
        _core("forward_core_0_16", *FLASHINFER),
    ),
    _band(
        ">=0.19.0,<0.20.0",
        "0.19.1",
        _builder("0_17", MODES),
        _layer(
            LAYER_0_19,
            "_forward_core",
            "forward_core_0_19",
            f"{LAYER_0_19}.forward",
            f"{LINEAR}:fused_gdn_gating",
            f"{LINEAR}:ChunkGatedDeltaRule.__init__",
        ),
    ),
    Band(
        "vllm",
        ">=0.20.0",
        retired=(
            "vLLM 0.20.0 and later build the chunk tables on the CPU in their own builder "
            "(vllm-project/vllm #38361) and hand them down to the kernels"
        ),
    ),
)

UNTOUCHED = (
    "vllm, decode and speculative batches without prefill, captured graphs with them: vLLM's own "
    "kernels, on metadata that is built without waiting for the device",
    "vllm 0.17 to 0.19 on SM90 (H100, H200), where vLLM chooses FlashInfer's prefill: it stays. "
    '`--additional-config \'{"gdn_prefill_backend": "triton"}\'` (from 0.18) makes the prefill '
    "ours; 0.17 has no such choice",
    "vllm 0.20 to 0.30, prompts of one token in a batch that decodes: vLLM takes them for decode, "
    "and they go on from what the last owner has left in their slot (up to 0.19 this patch "
    "empties it)",
    "vllm, layers with heads that the kernels do not take (K and V of 64, 128 and 256 they do), in "
    "float32, or without Triton: vLLM's own, and the state of the patch says why",
    "vllm, other layers on the same metadata: Kimi Linear (KDA) and OLMo hybrid derive their "
    "chunks on the device, as upstream does up to 0.32",
    "vllm on CPUs, releases other than 0.18: up to 0.20 vLLM has no GDN kernels there at all, and "
    "from 0.21 on its own",
)

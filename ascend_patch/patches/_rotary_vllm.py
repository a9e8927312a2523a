"""patch_rotary in vLLM's own classes: what serves CPU and CUDA machines.

Each range of releases has two bands: with the fused norm and rotation of Qwen3, and without it, for
a source whose rotary classes are recognised and whose Qwen3 or RMSNorm is another one.
"""

from __future__ import annotations

from ascend_patch._registry import NOTHING, REFERENCE, Band, Target

LAYERS = "vllm.model_executor.layers"
MODELS = "vllm.model_executor.models"
ROPE = f"{LAYERS}.rotary_embedding"
BASE, COMMON, MROPE = f"{ROPE}.base", f"{ROPE}.common", f"{ROPE}.mrope"
IMPL = "ascend_patch.impl.rotary"

# What our forwards read of the layers, and what their results must equal.
LAYER = (
    f"{BASE}:RotaryEmbeddingBase.__init__",
    f"{BASE}:RotaryEmbeddingBase._match_cos_sin_cache_dtype",
    f"{BASE}:RotaryEmbedding.__init__",
    f"{BASE}:RotaryEmbedding.forward_static",
    f"{COMMON}:ApplyRotaryEmb.forward_static",
)
# Up to 0.12 the classes are others, and the arithmetic is a function.
EARLY_LAYER = (
    *LAYER,
    f"{BASE}:RotaryEmbedding._match_cos_sin_cache_dtype",
    f"{COMMON}:apply_rotary_emb_torch",
)
SECTIONS = (
    f"{MROPE}:MRotaryEmbedding.__init__",
    f"{MROPE}:MRotaryEmbedding.forward_cpu",
    f"{MROPE}:apply_interleaved_rope",
)
NORM = (
    f"{LAYERS}.layernorm:RMSNorm.__init__",
    f"{LAYERS}.layernorm:RMSNorm.forward_native",
    f"{LAYERS}.layernorm:RMSNorm.forward_static",
    "vllm.ir.ops.layernorm:rms_norm",
)


def _traced(symbol: str, replacement: str, *context: str, oracle: str = "") -> Target:
    return Target(symbol, "traced", f"{IMPL}{replacement}", context, oracle=oracle)


def _native(replacement: str, layer: tuple[str, ...] = LAYER) -> tuple[Target, ...]:
    """What compiled models trace, and CPU servers without forward_cpu call."""
    return (
        _traced(f"{BASE}:RotaryEmbedding.forward_native", f":{replacement}", *layer),
        _traced(f"{MROPE}:MRotaryEmbedding.forward_native", "_sections:forward", *layer, *SECTIONS),
    )


CPU = _traced(f"{BASE}:RotaryEmbedding.forward_cpu", ":forward_cpu", *LAYER)
# The Triton kernel of these releases has no GPT-J pairs.
ADJACENT = _traced(
    f"{MROPE}:MRotaryEmbedding.forward_cuda",
    "_sections:forward_cuda",
    f"{MROPE}:triton_mrope",
    oracle=REFERENCE,
)
ANGLES = _traced(
    f"{COMMON}:ApplyRotaryEmb.forward_native",
    "_angles:forward",
    f"{COMMON}:ApplyRotaryEmb.forward_static",
    f"{COMMON}:ApplyRotaryEmb.forward_cpu",
    f"{COMMON}:ApplyRotaryEmb._pre_process",
    f"{COMMON}:ApplyRotaryEmb._post_process",
)
ANGLES_0_13 = _traced(
    f"{COMMON}:ApplyRotaryEmb.forward_native",
    "_angles:forward_0_13",
    f"{COMMON}:ApplyRotaryEmb.forward_static",
    f"{COMMON}:ApplyRotaryEmb.forward_cpu",
)
ANGLES_0_11 = _traced(
    f"{COMMON}:apply_rotary_emb_dispatch",
    "_angles:dispatch",
    f"{COMMON}:apply_rotary_emb_torch",
)
VISION_0_12 = _traced(
    f"{MODELS}.qwen2_vl:apply_rotary_pos_emb_vision",
    "_angles:vision_0_12",
    f"{COMMON}:apply_rotary_emb_torch",
    f"{COMMON}:dispatch_rotary_emb_function",
)
# Attention writes to its KV cache, and the projection behind it adds up over ranks.
FUSED = tuple(
    _traced(
        f"{MODELS}.{name}.forward",
        "_fused:forward",
        f"{MODELS}.{name}.__init__",
        *NORM,
        oracle=NOTHING,
    )
    for name in ("qwen3:Qwen3Attention", "qwen3_moe:Qwen3MoeAttention")
)


def _bands(versions: str, releases: str, *targets: Target) -> tuple[Band, Band]:
    """A range of releases with the fused form, and without it where only that is unknown."""
    recorded = tuple(releases.split())
    return (
        Band("vllm", versions, recorded, (*targets, *FUSED)),
        Band("vllm", versions, recorded, targets, label="without the fused form"),
    )


BANDS = (
    *_bands(
        ">=0.11.0,<0.12.0",
        "0.11.0 0.11.2",
        *_native("forward_before_0_16", EARLY_LAYER),
        ADJACENT,
        ANGLES_0_11,
    ),
    *_bands(
        ">=0.12.0,<0.13.0",
        "0.12.0",
        *_native("forward_before_0_16", EARLY_LAYER),
        ADJACENT,
        ANGLES_0_11,
        VISION_0_12,
    ),
    *_bands(">=0.13.0,<0.14.0", "0.13.0", *_native("forward_before_0_16"), ADJACENT, ANGLES_0_13),
    *_bands(
        ">=0.14.0,<0.16.0", "0.14.1 0.15.1", *_native("forward_before_0_16"), CPU, ADJACENT, ANGLES
    ),
    *_bands(
        ">=0.16.0,<0.27.0",
        "0.16.0 0.17.0 0.18.0 0.19.1 0.20.2 0.22.1 0.23.0 0.25.1 0.26.0",
        *_native("forward"),
        CPU,
        ADJACENT,
        ANGLES,
    ),
    *_bands(
        ">=0.27.0,<0.34.0",
        "0.27.1 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0",
        *_native("forward"),
        CPU,
        ANGLES,
    ),
)

"""Rotary embedding straight from `cos_sin_cache` and positions."""

from __future__ import annotations

from ascend_patch._registry import Band, Patch, Target
from ascend_patch.patches import _watch, _watch_ascend

BASE = "vllm.model_executor.layers.rotary_embedding.base"
COMMON = "vllm.model_executor.layers.rotary_embedding.common"
IMPL = "ascend_patch.impl.rotary"
ASCEND = "vllm_ascend.ops.rotary_embedding"
ASCEND_TRITON = "vllm_ascend.ops.triton.rope"
ASCEND_REGISTRATION = "vllm_ascend.ops.register_custom_ops"
ASCEND_IMPL = "ascend_patch.impl.rotary_ascend"

# What our forward reads of the layer, and what its result must equal.
LAYER = (
    f"{BASE}:RotaryEmbeddingBase.__init__",
    f"{BASE}:RotaryEmbeddingBase._match_cos_sin_cache_dtype",
    f"{BASE}:RotaryEmbedding.__init__",
    f"{BASE}:RotaryEmbedding.forward_static",
    f"{COMMON}:ApplyRotaryEmb.forward_static",
)


def _ascend_operator(name: str) -> Target:
    """The registered operator; its implementation has one body in every release that has it."""
    return Target(
        symbol=f"{ASCEND}:rope_forward_oot",
        seam="operator",
        operator=name,
        assigned_by=ASCEND_REGISTRATION,
        replacement=f"{ASCEND_IMPL}:rope_forward_oot",
        context=(
            f"{ASCEND_TRITON}:rope_forward_triton",
            f"{ASCEND_TRITON}:_triton_rope",
            f"{ASCEND_REGISTRATION}:<module>",
        ),
    )


def _remembers_whose_tables(name: str) -> Target:
    """A class whose layers share the cos and sin that are gathered once a step."""
    return Target(
        symbol=f"{ASCEND}:{name}.__init__",
        seam="host",
        replacement=f"{ASCEND_IMPL}:remember_whose_tables",
    )


PATCH = Patch(
    id="rotary",
    version="1",
    summary="RoPE from cos_sin_cache and positions, in fp32, for any rotary_dim",
    why=(
        "Releases round every product to the model's dtype, read sines from a wrong offset where "
        "rotary_dim is not a power of two, or rotate a draft model by the main model's angles."
    ),
    upstream="vllm-ascend #5450 (cos_sin_cache and positions) and #5799 (ApplyRotaryEmb)",
    remove_when="the release's own rotary operator passes `ascend-patch verify` on your models",
    bands=(
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
        Band(
            host="vllm_ascend",
            versions="",
            releases=("0.18.0", "releases/v0.18.0", "0.23.0", "releases/v0.23.0"),
            targets=(_ascend_operator("vllm::npu_rotary_embedding"),),
        ),
        Band(
            host="vllm_ascend",
            versions="",
            releases=("releases/v0.13.0",),
            targets=(_ascend_operator("vllm::rope_forward_oot"),),
        ),
        Band(
            host="vllm_ascend",
            versions="",
            releases=("0.13.0",),
            targets=(
                _remembers_whose_tables("AscendRotaryEmbedding"),
                _remembers_whose_tables("AscendYaRNRotaryEmbedding"),
                Target(
                    symbol=f"{ASCEND}:_rope_forward_oot",
                    seam="traced",
                    replacement=f"{ASCEND_IMPL}:rope_forward_oot_0_13",
                    context=(
                        f"{ASCEND}:_record_cos_sin_cache",
                        f"{ASCEND}:update_cos_sin",
                        f"{ASCEND}:get_cos_and_sin_slice",
                        f"{ASCEND}:AscendRotaryEmbedding.forward_oot",
                    ),
                ),
            ),
        ),
    ),
    watch={"vllm": _watch.ROTARY, "vllm_ascend": _watch_ascend.ROTARY},
    untouched=(
        "MRotaryEmbedding, DeepseekScalingRotaryEmbedding and Llama4VisionRotaryEmbedding: they "
        "derive from RotaryEmbeddingBase and keep their own arithmetic",
        "RotaryEmbedding.forward_cuda and forward_hip: vLLM's own kernels are right there",
        "vllm_ascend, rotary_dim a power of two, or no Triton: the release's kernel is right there",
        "vllm_ascend, MLA and SFA (DeepSeek, GLM-5, Kimi), MiniMax, 310P: they rotate elsewhere",
    ),
)

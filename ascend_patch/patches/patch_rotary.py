"""Rotary embedding straight from `cos_sin_cache` and positions."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _rotary_ascend, _rotary_vllm, _watch, _watch_ascend

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
    bands=_rotary_vllm.BANDS + _rotary_ascend.BANDS,
    watch={"vllm": _watch.ROTARY, "vllm_ascend": _watch_ascend.ROTARY},
    untouched=(
        "MRotaryEmbedding, DeepseekScalingRotaryEmbedding and Llama4VisionRotaryEmbedding: they "
        "derive from RotaryEmbeddingBase and keep their own arithmetic",
        "RotaryEmbedding.forward_cuda and forward_hip: vLLM's own kernels are right there",
        "vllm_ascend, rotary_dim a power of two, or no Triton: the release's kernel is right there",
        "vllm_ascend, MLA and SFA (DeepSeek, GLM-5, Kimi), MiniMax, 310P: they rotate elsewhere",
    ),
)

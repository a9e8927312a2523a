"""Rotary embedding straight from `cos_sin_cache` and positions."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _rotary_ascend, _rotary_vllm, _watch, _watch_ascend

PATCH = Patch(
    id="rotary",
    version="2",
    summary="RoPE from cos_sin_cache and positions, in fp32, for any rotary_dim",
    why=(
        "Releases round every product to the model's dtype, read sines from a wrong offset where "
        "rotary_dim is not a power of two, or rotate a draft model by the main model's angles."
    ),
    upstream="vllm-ascend #5450 (cos_sin_cache and positions) and #5799 (ApplyRotaryEmb)",
    remove_when="the release's own rotary operator passes `ascend-patch verify` on your models",
    bands=_rotary_vllm.BANDS + _rotary_ascend.BANDS,
    watch={"vllm": _watch.ROTARY, "vllm_ascend": _watch_ascend.ROTARY},
    self_test="ascend_patch.impl.rotary_selftest:cases",
    untouched=(
        "vllm, classes with arithmetic of their own: Deepseek, Llama 4 vision, dual chunk, Phi-3 "
        "LongRoPE, Fourier, XDRope, Ernie 4.5 VL, Bailing; some of them rotate through "
        "ApplyRotaryEmb, which is changed",
        "vllm, forward_cuda, forward_hip and forward_xpu: vLLM's compiled kernels stay, but for "
        "MRotaryEmbedding with GPT-J pairs up to 0.26, which its kernel does not know",
        "vllm, vision towers on CUDA, those that ask for float32, and all of 0.11: they are right",
        "vllm, Qwen3 and Qwen3-MoE: norm and rotation stay two steps on a CPU, with dual chunk "
        "attention, other rotary classes or norms, and under VLLM_BATCH_INVARIANT",
        "vllm on ROCm and XPU: every layer, though its targets are applied",
        "vllm_ascend, where the release is right it runs, and its fusion passes match as before: "
        "npu_rotary_embedding without Triton, or with rotary_dim a power of two and heads that its "
        "kernel takes; qkv_rmsnorm_rope in bfloat16 and one tile of tokens a core; Qwen3-VL's "
        "and Qwen3.5's operator with angles by axis; npu_rotary_mul and npu_mrope in their limits",
        "vllm_ascend, MLA and SFA (DeepSeek, GLM-5, Kimi): they gain nothing; attention rotates by "
        "npu_interleave_rope and npu_kv_rmsnorm_rope_cache, or by kernels it imports by name",
        "vllm_ascend, MiniMax: its norm over all ranks' heads (split_qkv_tp_rmsnorm_rope) keeps "
        "the angles gathered once a step; 310P: it has rotary classes of its own, or in 0.11 and "
        "0.13 other operators; A5: qkv_rmsnorm_rope_simt",
        "vllm_ascend, models with two kinds of RoPE (Gemma 3, some drafts) where both go through "
        "torch_npu's _npu_rotary_embedding (heads other than 128 up to 0.13.0, later without "
        "Triton): op-plugin's adapter keeps the first cos_sin_cache of a process for all",
        "vllm_ascend, Llama 3, linear and dynamic NTK scaling: it has no classes for them, and "
        "they run vLLM's own torch code on an NPU",
        "vllm_ascend, torchair's graph mode of 0.11: it replaces the rotary methods by its own",
    ),
)

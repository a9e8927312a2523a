"""Attention calls to the operator that computes each case right."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _attention_ascend, _attention_vllm, _watch, _watch_ascend

PATCH = Patch(
    id="attention_router",
    version="2",
    summary="Attention calls to the operator that computes each case right",
    why=(
        "Causal pooling models lose prefix-cache hits and earlier chunks, windows are ignored or "
        "one key too wide, and attention that is not causal gets a causal mask."
    ),
    upstream="vllm-ascend #7452 and #7894",
    remove_when="the release's table in docs/attention.md has no row left that is wrong",
    bands=_attention_vllm.BANDS + _attention_ascend.BANDS,
    watch={"vllm": _watch.ATTENTION_ROUTER, "vllm_ascend": _watch_ascend.ATTENTION_ROUTER},
    self_test="ascend_patch.impl.attention_selftest:cases",
    untouched=(
        *_attention_vllm.UNTOUCHED,
        "vllm_ascend, every step that the release computes right: its own call, its own operator",
        "vllm_ascend 0.11.0, pooling: it has no branch of its own there, so what #7452 mends is "
        "absent; windows and heads of 192 elements are changed",
        "vllm_ascend 0.18.0, pooling: the release has #7894, and is right but for int8 caches",
        "vllm_ascend, captured graphs: capture and replay are the release's own, and up to 0.18.0 "
        "they ignore windows (0.18.0: sinks as well); the state then says `window ignored in "
        "captured decode`; 0.23.0's capture and replay are given the right window",
        "vllm_ascend, context parallel (AscendAttentionCPImpl), FA3 (AscendFAImpl) and 310P "
        "(AscendAttentionBackendImpl310): they inherit the method, and run it as it was; A5: its "
        "operators have other limits",
        "vllm_ascend, MLA, SFA and DSA (DeepSeek, GLM-5, Kimi), xlite, and torchair's graph mode "
        "of 0.11.0: they have attention classes of their own",
        "vllm_ascend, int8 caches (C8): windows and attention that is not causal; 0.11.0's "
        "quantised layers, which have a method of their own",
        "vllm_ascend 0.11.0 and 0.13.0, sinks: their class takes none",
        "vllm_ascend 0.23.0: kv-comp (hamming sparse), a window on attention that is not causal, "
        "and the band of a window for heads of 256 elements, which some CANN has no kernel for",
        "vllm_ascend, heads of 256 elements that are not grouped (Gemma 7B): without a window they "
        "get the release's own call, which some CANN has no kernel for",
    ),
)

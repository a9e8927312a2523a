"""Attention calls to the operator that computes each case right."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _attention_ascend, _attention_vllm, _watch, _watch_ascend

PATCH = Patch(
    id="attention_router",
    version="2",
    summary="Attention calls to the operator that computes each case right",
    why="Causal pooling models lose prefix-cache hits, and windows are ignored in some batches.",
    upstream="vllm-ascend #7452 and #7894",
    remove_when="no release in use needs it",
    bands=_attention_vllm.BANDS + _attention_ascend.BANDS,
    watch={"vllm": _watch.ATTENTION_ROUTER, "vllm_ascend": _watch_ascend.ATTENTION_ROUTER},
)

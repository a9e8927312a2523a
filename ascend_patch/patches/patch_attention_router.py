"""Attention calls to the operator that computes each case right."""

from __future__ import annotations

from ascend_patch._registry import Patch

PATCH = Patch(
    id="attention_router",
    version="0",
    summary="Attention calls to the operator that computes each case right",
    why="Causal pooling models lose their prefix-cache hits, and windows are ignored in some batches.",
    upstream="vllm-ascend #7452 and #7894",
    remove_when="no release in use needs it",
    watch={
        "vllm": (),
        "vllm_ascend": (),
    },
)

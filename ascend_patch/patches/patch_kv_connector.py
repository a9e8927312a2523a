"""Any prefill TP to any decode TP over Mooncake, or a clear refusal."""

from __future__ import annotations

from ascend_patch._registry import Patch

PATCH = Patch(
    id="kv_connector",
    version="0",
    summary="Any prefill TP to any decode TP over Mooncake, or a clear refusal",
    why="Unequal tensor-parallel sizes hang, or corrupt the KV cache without a word.",
    upstream="vllm-ascend #2947",
    remove_when="no release in use needs it",
    watch={
        "vllm": (),
        "vllm_ascend": (),
    },
)

"""Any prefill TP to any decode TP over Mooncake, or a clear refusal."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _kv_vllm, _watch, _watch_ascend

PATCH = Patch(
    id="kv_connector",
    version="1",
    summary="Any prefill TP to any decode TP over Mooncake, or a clear refusal",
    why=(
        "Unequal tensor-parallel sizes hang, or corrupt the KV cache without a word; a failed "
        "transfer becomes a request that never ends."
    ),
    upstream="vllm-ascend #2947",
    remove_when="no release in use needs it",
    bands=_kv_vllm.BANDS,
    watch={"vllm": _watch.KV_CONNECTOR, "vllm_ascend": _watch_ascend.KV_CONNECTOR},
    untouched=_kv_vllm.UNTOUCHED,
)

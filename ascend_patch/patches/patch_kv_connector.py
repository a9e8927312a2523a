"""Any prefill TP to any decode TP over Mooncake, or a clear refusal."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _kv_ascend, _kv_vllm, _watch, _watch_ascend

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
    bands=(*_kv_ascend.BANDS, *_kv_vllm.BANDS),
    watch={"vllm": _watch.KV_CONNECTOR, "vllm_ascend": _watch_ascend.KV_CONNECTOR},
    untouched=(
        "vllm 0.11 and 0.12: they have no MooncakeConnector",
        "vllm 0.13 to 0.15: equal TP sizes alone are moved; others are refused where both sides "
        "are patched, and not noticed where the prefill server is not",
        "vllm 0.16 to 0.18: pipeline parallelism, which the release refuses; models with several "
        "kinds of cache (Mamba, sliding windows), which have several block lists",
        "vllm 0.19 to 0.29: a transfer that fails still leaves its request waiting",
        "vllm: NixlConnector, P2pNcclConnector, MoRIIO and the others",
        *_kv_ascend.UNTOUCHED,
    ),
)

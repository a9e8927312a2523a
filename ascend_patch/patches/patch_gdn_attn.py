"""GDN prefill without host/device round trips."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _gdn_ascend, _gdn_vllm, _watch, _watch_ascend

PATCH = Patch(
    id="gdn_attn",
    version="1",
    summary="GDN prefill without host/device round trips, and on CPUs at all",
    why=(
        "Chunk metadata is derived on the device, with three synchronisations a call, and the "
        "builder waits for the device as well; without Triton GDN models do not run at all. vLLM "
        "0.17 refuses a step of drafts and decode, 0.18 to 0.27 give drafts beside a prompt the "
        "gates of other tokens."
    ),
    upstream="vllm-ascend #7487; vLLM's own is #38361",
    remove_when="vLLM 0.20.0 or later, or a vllm-ascend whose layers read nothing from the device",
    bands=_gdn_vllm.BANDS + _gdn_ascend.BANDS,
    watch={"vllm": _watch.GDN_ATTN, "vllm_ascend": _watch_ascend.GDN_ATTN},
    self_test="ascend_patch.impl.gdn_selftest:cases",
    untouched=_gdn_vllm.UNTOUCHED + _gdn_ascend.UNTOUCHED,
)

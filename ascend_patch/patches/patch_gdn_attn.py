"""GDN prefill without host/device round trips."""

from __future__ import annotations

from ascend_patch._registry import Patch
from ascend_patch.patches import _watch, _watch_ascend

PATCH = Patch(
    id="gdn_attn",
    version="0",
    summary="GDN prefill without host/device round trips",
    why="Chunk metadata is derived on the device, with three synchronisations a call.",
    upstream="vllm-ascend #7487",
    remove_when="no release in use needs it",
    watch={"vllm": _watch.GDN_ATTN, "vllm_ascend": _watch_ascend.GDN_ATTN},
)

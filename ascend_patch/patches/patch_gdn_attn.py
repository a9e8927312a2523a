"""GDN prefill without host/device round trips."""

from __future__ import annotations

from ascend_patch._registry import Patch

PATCH = Patch(
    id="gdn_attn",
    version="0",
    summary="GDN prefill without host/device round trips",
    why="Chunk metadata is derived on the device, with three synchronisations a call.",
    upstream="vllm-ascend #7487",
    remove_when="no release in use needs it",
    watch={
        "vllm": (),
        "vllm_ascend": (),
    },
)

"""gated_rms_norm in torch: float32 arithmetic, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from ascend_patch.kernels.gdn.gated_norm import Call


def run(call: Call) -> None:
    """Any call that `gated_norm.gated_rms_norm` accepts."""
    x = call.x.float()
    gate = None if call.gate is None else functional.silu(call.gate.float())
    if gate is not None and not call.norm_before_gate:
        x = x * gate
    groups = x.unflatten(-1, (-1, call.group))
    mean = groups.square().mean(-1, keepdim=True)
    result = (groups * torch.rsqrt(mean + call.eps)).flatten(-2) * call.weight.float()
    if gate is not None and call.norm_before_gate:
        result = result * gate
    call.out.copy_(result)

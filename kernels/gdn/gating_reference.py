"""fused_gating in torch: float32 arithmetic, any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ascend_patch.kernels.gdn.gating import GatingCall


def run(call: GatingCall) -> None:
    """Any call that `gating.fused_gating` accepts."""
    gates = gate(call.a, call.b, call.A_log, call.dt_bias, call.softplus_beta, call.threshold)
    for into, x in zip((call.g, call.beta), gates, strict=True):
        into.copy_(x)


def gate(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    softplus_beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """g and beta, both float32, of a and b [.., HV] and A_log and dt_bias [HV]."""
    steps = torch.nn.functional.softplus(a.float() + dt_bias.float(), softplus_beta, threshold)
    return -A_log.float().exp() * steps, b.float().sigmoid()

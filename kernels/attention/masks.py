"""The mask of the compressed sparse modes, and how long it is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.attention.batch import Batch

_SIZE = 2048
_on_cpu: dict[torch.device, Tensor] = {}


def causal_mask(device: torch.device | str) -> Tensor:
    """[2048, 2048] int8, 1 above the diagonal (masked); on a CPU always the same tensor."""
    device = torch.device(device)
    found = _on_cpu.get(device)
    if found is None:
        found = torch.ones(_SIZE, _SIZE, dtype=torch.int8, device=device).triu_(1)
        if device.type == "cpu":
            _on_cpu[device] = found
    return found


def of_step(batch: Batch, device: torch.device) -> Tensor:
    """The mask, made once a step.

    It is not kept for longer: memory of a device that is first asked for while a model is loaded,
    as the self-test at load does, goes with the weights when vLLM sleeps.
    """
    found: Tensor | None = batch.derived.get("mask")
    if found is None:
        found = batch.derived["mask"] = causal_mask(device)
    return found

"""The operator ``ascend_patch::apply_rotary``: functional, with a fake implementation.

Importing this module registers it, once in a process. It is for inference and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import angles_call, checks, reference, registration, triton_call

OPERATOR = angles_call.OPERATOR
QUALIFIED = f"ascend_patch::{OPERATOR}"
_SCHEMA = "(Tensor x, Tensor cos, Tensor sin, bool is_neox_style) -> Tensor"

dispatch.register(
    OPERATOR,
    dispatch.ANY_DEVICE,
    dispatch.Implementation("reference", reference.apply_rotary_into),
)
triton_call.register(OPERATOR, angles_call.apply_rotary_into, angles_call.supports)


def _output(x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> Tensor:
    """Check the call and allocate: also all that the fake implementation has to do."""
    checks.check_angles(x, cos, sin)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _run(x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> Tensor:
    out = _output(x, cos, sin, is_neox_style)
    call = (out, x, cos, sin, is_neox_style)
    choice = dispatch.select(OPERATOR, x.device.type, *call)
    if choice.implementation is None:
        raise NotImplementedError(f"{QUALIFIED} cannot run here: {choice.reason}.")
    choice.implementation.run(*call)
    dispatch.observe(QUALIFIED)
    return out


def register_operator() -> None:
    """Define the operator unless it exists; safe to call any number of times."""
    registration.define(OPERATOR, _SCHEMA, _run, _output)


register_operator()

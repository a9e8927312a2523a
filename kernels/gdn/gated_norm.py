"""gated_rms_norm: what it takes, and who runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.gdn import gated_norm_reference

OPERATOR = "gated_rms_norm"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Call:
    """A checked call.

    Attributes:
        x, out: [.., D].
        gate: The same, or None.
        weight: [D].
        group: Elements of a row that are normalised together; divides D.
    """

    x: Tensor
    gate: Tensor | None
    weight: Tensor
    eps: float
    group: int
    norm_before_gate: bool
    out: Tensor


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """RMS norm of each row, times the gate's silu: the last step of a gated delta rule layer.

    norm(x) = x / sqrt(mean(x^2) + eps) * weight; the result is norm(x) silu(gate), or with
    ``norm_before_gate`` false norm(x silu(gate)). Arithmetic is float32, rounded once.

    Args:
        x: [.., D], bfloat16, float16 or float32; any strides. [T, heads, D] as slices of a wider
            row are read where they lie.
        gate: The same shape, or None for no gate.
        weight: [D].
        eps: Added to the mean of the squares.
        group_size: Elements that are normalised together; all D if None.
        norm_before_gate: Which comes first.
        out: x's shape and dtype, for the result; it may be x or gate.

    Returns:
        out.

    Raises:
        TypeError: A dtype outside the above.
        ValueError: Shapes, devices or memory that do not fit, a group size that does not divide D,
            or a tensor that requires a gradient.
        NotImplementedError: No implementation takes this call; the message says what each asks for.

    Source: vLLM's RMSNormGated.forward_native (model_executor/layers/layernorm.py), with silu.
    """
    eps = arguments.check_number("eps", eps, least=0)
    group = _check(x, gate, weight, group_size, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    call = Call(x, gate, weight, eps, group, norm_before_gate, out)
    choice = dispatch.select(OPERATOR, x.device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{OPERATOR} on {x.device.type}: {choice.reason}")
    dispatch.observe(OPERATOR)
    choice.implementation.run(call)
    return out


def _check(
    x: Tensor, gate: Tensor | None, weight: Tensor, group_size: int | None, out: Tensor | None
) -> int:
    """The group's size. No device memory is read."""
    arguments.check_tensors(OPERATOR, {"x": x, "weight": weight}, {"gate": gate, "out": out})
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight), ("out", out)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {tensor.dtype}")
    if x.dim() < 1 or not x.shape[-1]:
        raise ValueError(f"x must be [.., D], not {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], not {tuple(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, not {tuple(gate.shape)}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(
            f"out must be {tuple(x.shape)} in {x.dtype}, not {tuple(out.shape)} in {out.dtype}"
        )
    if out is not None:
        arguments.check_written("out", out)
        arguments.check_apart("out", out, {"weight": weight})
        arguments.check_apart("out", out, {"x": x, "gate": gate}, itself=True)
    if group_size is None:
        return int(x.shape[-1])
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size must be a whole number of elements, not {group_size!r}")
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"group_size must divide the {x.shape[-1]} of a row, not {group_size}")
    return group_size


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", gated_norm_reference.run)
)

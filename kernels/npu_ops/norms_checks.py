"""What the documentation of npu_rms_norm and npu_add_rms_norm rules out on Atlas A2 and A3."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError, require

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MOST_DIMS = 8


def _gamma(operator: str, name: str, x: Tensor, gamma: Tensor) -> None:
    if not 1 <= x.dim() <= _MOST_DIMS:
        raise OperatorError(f"{operator}: {name} has {x.dim()} dimensions, not 1 to {_MOST_DIMS}")
    shape, weight = tuple(x.shape), tuple(gamma.shape)
    if not weight or len(weight) > x.dim() or shape[x.dim() - len(weight) :] != weight:
        raise OperatorError(
            f"{operator}: gamma {list(weight)} must be the last dimensions of {name} {list(shape)}"
        )


def rms_norm(operator: str, x: Tensor, gamma: Tensor, mixed: bool) -> None:
    """gamma of x's dtype, or float32 where it may be ``mixed``; its dimensions are x's last."""
    require(x.dtype in _FLOATS, operator, f"input is {x.dtype}, not one of {list(_FLOATS)}")
    if gamma.dtype != x.dtype and not (mixed and gamma.dtype == torch.float32):
        raise OperatorError(
            f"{operator}: gamma is {gamma.dtype} for an input of {x.dtype}; it must have that "
            "dtype" + (" or be torch.float32" if mixed else "")
        )
    require(gamma.numel() > 0, operator, f"gamma {list(gamma.shape)} must not be empty")
    _gamma(operator, "input", x, gamma)


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor) -> None:
    """x1, x2 and gamma of one dtype; x1 and x2 of one shape, 1 to 8 dimensions, not empty."""
    operator = "npu_add_rms_norm"
    require(x1.dtype in _FLOATS, operator, f"x1 is {x1.dtype}, not one of {list(_FLOATS)}")
    for name, other in (("x2", x2), ("gamma", gamma)):
        if other.dtype != x1.dtype:
            raise OperatorError(
                f"{operator}: {name} is {other.dtype} and x1 {x1.dtype}; they must be the same"
            )
    if x1.shape != x2.shape:
        raise OperatorError(
            f"{operator}: x1 {list(x1.shape)} and x2 {list(x2.shape)} must have the same shape"
        )
    _gamma(operator, "x1", x1, gamma)
    require(x1.numel() > 0, operator, f"x1 {list(x1.shape)} is empty, which is not supported")

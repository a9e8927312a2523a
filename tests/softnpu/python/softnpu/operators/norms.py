"""RMS norms of vllm-ascend's own library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def normalized(x: Tensor, gamma: Tensor, beta: Tensor | None, epsilon: float) -> list[Tensor]:
    """[x / rms * gamma + beta in x's dtype, 1 / rms float32 [..., 1]], over the last dimension."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    y = wide * rstd * gamma.float()
    return [(y if beta is None else y + beta.float()).to(x.dtype), rstd]


def npu_add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, 1 / rms, x) of x = x1 + x2, rounded; y is x's norm times gamma, plus beta.

    x1, x2 [..., n], gamma and beta [n], all of one dtype.
    """
    name = "npu_add_rms_norm_bias"
    require(x1.dtype in _FLOATS, name, f"x1 is {x1.dtype}, not one of {_FLOATS}")
    same = x1.shape == x2.shape and x1.dtype == x2.dtype == gamma.dtype
    require(same, name, f"x1 {x1.shape} {x1.dtype}, x2 {x2.shape} {x2.dtype}, gamma {gamma.dtype}")
    require(gamma.shape == x1.shape[-1:], name, f"gamma {gamma.shape} for x1 {x1.shape}")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = normalized(x, gamma, beta, epsilon)
    return y, rstd, x


def npu_gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms) of x [..., n], with 1 + gamma in gamma's place, the sum in float32."""
    require(x.dtype in _FLOATS, "npu_gemma_rms_norm", f"x is {x.dtype}, not one of {_FLOATS}")
    y, rstd = normalized(x, gamma.float() + 1, None, epsilon)
    return y, rstd


KERNELS: dict[str, Callable[..., Any]] = {
    "_C_ascend::npu_add_rms_norm_bias": npu_add_rms_norm_bias,
    "_C_ascend::npu_gemma_rms_norm": npu_gemma_rms_norm,
}

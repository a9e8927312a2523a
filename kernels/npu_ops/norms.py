"""RMS norms: float32 arithmetic, each output rounded once.

Formula, of torch_npu's documentation: y = x / sqrt(mean(x^2) + epsilon) * gamma, the mean over
gamma's dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import norms_checks as checks


def _normalised(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms * gamma in x's dtype, and 1 / rms, float32 [*x.shape[:-gamma.dim()], 1, ...]."""
    wide = x.float()
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """input [..., *gamma.shape] -> (y like input, 1 / rms float32 [..., 1 for each of gamma's]).

    Raises OperatorError for dtypes and shapes that the documentation rules out.
    """
    checks.rms_norm("npu_rms_norm", input, gamma, mixed=True)
    return _normalised(input, gamma, epsilon)


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, 1 / rms, x) of x = x1 + x2; y is that of x as it is returned, rounded to its dtype.

    Raises OperatorError for dtypes and shapes that the documentation rules out.
    """
    checks.add_rms_norm(x1, x2, gamma)
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = _normalised(x, gamma, epsilon)
    return y, rstd, x


def npu_add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``npu_add_rms_norm`` in place: x1 becomes y and x2 the sum; 1 / rms is returned."""
    y, rstd, x = npu_add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(x)
    return rstd


def npu_gemma_rms_norm(
    input: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``npu_rms_norm`` with 1 + gamma in gamma's place, the sum in float32."""
    checks.rms_norm("npu_gemma_rms_norm", input, gamma, mixed=False)
    y, rstd = _normalised(input.float(), gamma.float() + 1, epsilon)
    return y.to(input.dtype), rstd


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_rms_norm": npu_rms_norm,
    "npu::npu_add_rms_norm": npu_add_rms_norm,
    "npu::npu_add_rms_norm_v2": npu_add_rms_norm_v2,
    "npu::npu_gemma_rms_norm": npu_gemma_rms_norm,
}

"""Activation functions, and the matrix product that accumulates in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b of the halves a, b of `dim`; input [..., 2n, ...] -> [..., n, ...].

    Raises OperatorError for other dtypes than float16, bfloat16, float32 and for odd sizes.
    """
    require(input.dtype in _FLOATS, "npu_swiglu", f"input is {input.dtype}, not one of {_FLOATS}")
    size = input.shape[dim]
    require(size % 2 == 0, "npu_swiglu", f"dimension {dim} has {size} elements, not an even number")
    gate, up = input.float().chunk(2, dim)
    return (F.silu(gate) * up).to(input.dtype)


def npu_silu(input: Tensor) -> Tensor:
    """input * sigmoid(input)."""
    require(input.dtype in _FLOATS, "npu_silu", f"input is {input.dtype}, not one of {_FLOATS}")
    return F.silu(input)


def npu_fast_gelu(input: Tensor) -> Tensor:
    """x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)."""
    require(input.dtype in _FLOATS, "npu_fast_gelu", f"input is {input.dtype}, not {_FLOATS}")
    wide = input.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(input.dtype)


def _npu_dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as `to` does."""
    return input.to(dtype)


def _npu_matmul_add_fp32(x: Tensor, weight: Tensor, C: Tensor) -> None:
    """C += x^T weight in float32; x [k, m], weight [k, n] of one 16-bit dtype, C float32 [m, n]."""
    name = "_npu_matmul_add_fp32"
    require(C.dtype == torch.float32, name, f"C is {C.dtype}, not torch.float32")
    same = x.dtype == weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    require(same, name, f"x is {x.dtype} and weight {weight.dtype}, not one 16-bit float")
    C.add_(x.float().t() @ weight.float())


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_swiglu": npu_swiglu,
    "npu::npu_silu": npu_silu,
    "npu::npu_fast_gelu": npu_fast_gelu,
    "npu::_npu_dtype_cast": _npu_dtype_cast,
    "atb::_npu_matmul_add_fp32": _npu_matmul_add_fp32,
}

"""int8 quantization, alone and behind an RMS norm. Rounding is to the nearest, ties to even."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require
from softnpu.operators.norms import normalized

INT8 = (None, 1, torch.int8, 12, torch.qint8)  # as dtype arguments name it: ScalarTypes 1, 12


def _rounded(wide: Tensor) -> Tensor:
    return wide.round().clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: Any = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(int8 like input, float32 scale [...]): a scale for each row, max(|x|) / 127.

    input [..., n] float16 or bfloat16; smooth_scales [n], multiplied in first.
    """
    name = "npu_dynamic_quant"
    floats = (torch.float16, torch.bfloat16)
    require(input.dtype in floats, name, f"input is {input.dtype}, not one of {floats}")
    plain = group_index is None and dst_type in INT8 and quant_mode == "pertoken"
    require(plain and not dst_type_max, name, "only per-token int8 without groups is implemented")
    wide = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    return _rounded(wide / scale[..., None]), scale


def npu_quantize(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: Any,
    axis: int = 1,
    div_mode: bool = True,
) -> Tensor:
    """int8 of input / scales + zero_points, or of input * scales where `div_mode` is false.

    scales has one element, or as many as the last dimension.
    """
    name = "npu_quantize"
    require(dtype in INT8, name, f"dtype {dtype} is not implemented, only int8 is")
    last = axis in (-1, input.dim() - 1) or scales.numel() == 1
    require(last, name, f"axis {axis} is not implemented, only the last one is")
    wide = input.float() / scales.float() if div_mode else input.float() * scales.float()
    return _rounded(wide if zero_points is None else wide + zero_points.float())


def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 y1, int8 y2, x) of x = x1 + x2: its norm by `scales1` and, where given, `scales2`."""
    require(dst_type in INT8, "npu_add_rms_norm_quant", "only int8 is implemented")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, _ = normalized(x, gamma, beta, epsilon)
    first = npu_quantize(y, scales1, zero_points1, None, axis, div_mode)
    second = torch.empty_like(first[:0])
    if scales2 is not None:
        second = npu_quantize(y, scales2, zero_points2, None, axis, div_mode)
    return first, second, x


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] = (),
    y_dtype: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(int8 y1, int8 y2, x, scale1, scale2) of x = x1 + x2: its norm, quantized for each row."""
    name = "npu_add_rms_norm_dynamic_quant"
    require(y_dtype in INT8, name, "only int8 is implemented")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, _ = normalized(x, gamma, beta, epsilon)
    first, scale1 = npu_dynamic_quant(y, smooth_scales=smooth_scale1)
    second, scale2 = torch.empty_like(first[:0]), torch.empty_like(scale1[:0])
    if smooth_scale2 is not None or (len(output_mask) > 1 and output_mask[1]):
        second, scale2 = npu_dynamic_quant(y, smooth_scales=smooth_scale2)
    return first, second, x, scale1, scale2


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_dynamic_quant": npu_dynamic_quant,
    "npu::npu_quantize": npu_quantize,
    "npu::npu_add_rms_norm_quant": npu_add_rms_norm_quant,
    "npu::npu_add_rms_norm_dynamic_quant": npu_add_rms_norm_dynamic_quant,
}

"""Faults of operators that tests inject, by the name in SOFTNPU_DEFECT.

The faults of the boxed kernel (`copied_argument`, `lost_resize`) are in device/boxed_kernel.cpp.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

Kernel = Callable[..., Any]


def _wrong_scale(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
    """A norm that is 2 % too large."""
    y, *rest = kernel(*args, **kwargs)
    return (y * 1.02).to(y.dtype), *rest


def _swapped_halves(kernel: Kernel, input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """A gated activation that takes the gate for the value."""
    return kernel(torch.cat(input.chunk(2, dim)[::-1], dim), dim)


def _zeros(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
    """A stub that returns something of the right shape."""
    return torch.zeros_like(kernel(*args, **kwargs))


DEFECTS: dict[str, dict[str, Kernel]] = {
    "wrong_scale": {"_C_ascend::npu_add_rms_norm_bias": _wrong_scale},
    "swapped_halves": {"npu::npu_swiglu": _swapped_halves},
    "zeros": {"npu::npu_swiglu": _zeros},
}


def injected(name: str, kernel: Kernel) -> Kernel:
    """Return the kernel of an operator, with the fault of SOFTNPU_DEFECT if it is that one's."""
    fault = DEFECTS.get(os.environ.get("SOFTNPU_DEFECT", ""), {}).get(name)
    return kernel if fault is None else functools.partial(fault, kernel)

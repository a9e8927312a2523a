"""Rotary embedding a second time, in fp64 and from another formula, to judge kernels by.

A pair (a, b) is the complex number a + ib, and its rotation the product with cos + i sin. Nothing
of ``ascend_patch`` is imported here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# Explicit mantissa bits and the smallest normal exponent.
_FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float32: (23, -126)}
_FP32_EPSILON = 2.0**-23


class Expected(NamedTuple):
    """value: fp64 results; weight: |a| + |b| of each element's pair, 0 where nothing rotates."""

    value: np.ndarray
    weight: np.ndarray


def _fp64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def axis_of_frequency(section: list[int], interleaved: bool, half: int) -> list[int]:
    """Which of the three position rows each frequency reads, dealt out one by one."""
    if not interleaved:
        return [axis for axis, size in enumerate(section) for _ in range(size)]
    axes = [0] * half
    for axis in (1, 2):
        for n in range(section[axis]):
            if axis + 3 * n < half:
                axes[axis + 3 * n] = axis
    return axes


def phases(positions, cache, mrope_section=None, mrope_interleaved=False) -> np.ndarray:
    """cos + i sin of each token and frequency, complex128 [T, rotary_dim/2]."""
    table = _fp64(cache)
    half = table.shape[1] // 2
    phase = table[:, :half] + 1j * table[:, half:]
    where = positions.cpu().numpy()
    if mrope_section is None or where.ndim == 1:
        return phase[where.reshape(-1)]
    columns = [
        phase[where[axis], j]
        for j, axis in enumerate(axis_of_frequency(mrope_section, mrope_interleaved, half))
    ]
    return np.stack(columns, axis=1)


def rotate(x: torch.Tensor, phase: np.ndarray, head_size: int, is_neox_style: bool) -> Expected:
    """x [T, H*D] or [T, H, D] by phase [T, rotary_dim/2]; results have x's shape."""
    heads = _fp64(x).reshape(x.shape[0], x.numel() // max(x.shape[0], 1) // head_size, head_size)
    half = phase.shape[1]
    value, weight = heads.copy(), np.zeros_like(heads)
    a = np.arange(half) if is_neox_style else 2 * np.arange(half)
    b = a + (half if is_neox_style else 1)
    z = (heads[:, :, a] + 1j * heads[:, :, b]) * phase[:, None, :]
    value[:, :, a], value[:, :, b] = z.real, z.imag
    weight[:, :, a] = weight[:, :, b] = np.abs(heads[:, :, a]) + np.abs(heads[:, :, b])
    return Expected(value.reshape(x.shape), weight.reshape(x.shape))


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of ``dtype`` at the magnitude of each element."""
    bits, lowest = _FORMATS[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    exponent = np.where(x == 0, lowest, exponent)
    return np.exp2(np.maximum(exponent, lowest) - bits)


def assert_close(got: torch.Tensor, expected: Expected, share: bool = True) -> None:
    """All elements: within 1 ulp + 4 fp32 epsilons of |a| + |b|; 99.9 % of them: within 1 ulp.

    An fp32 result has no digits to spare over the fp32 products that it is the sum of: where they
    cancel, an ulp of the sum is finer than what either product resolves. There the 99.9 % are
    held to an ulp at the pair's magnitude. Without ``share`` only the first bound counts.
    """
    assert list(got.shape) == list(expected.value.shape)
    found = _fp64(got)
    if found.size == 0:
        return
    assert np.isfinite(found).all(), "the output has elements that nobody wrote"
    error = np.abs(found - expected.value)
    unit = ulp(np.maximum(np.abs(found), np.abs(expected.value)), got.dtype)
    within = unit + 4 * _FP32_EPSILON * expected.weight
    worst = np.unravel_index(np.argmax(error / within), error.shape)
    assert (error <= within).all(), (
        f"{(error > within).sum()} of {error.size} elements are out of bounds; the worst is at "
        f"{tuple(map(int, worst))}: {found[worst]} instead of {expected.value[worst]}"
    )
    strict = np.maximum(unit, ulp(expected.weight, got.dtype) * (got.dtype == torch.float32))
    outside = int((error > strict).sum())
    # A small tensor is a small sample: a handful of elements says nothing about a share of 0.1 %.
    allowed = max(4, error.size // 1000)
    assert outside <= allowed or not share, (
        f"{outside} of {error.size} elements are not within one ulp"
    )

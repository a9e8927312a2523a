"""The oracle of rope_oracle.py once more in torch, complex fp64, for tensors on a GPU.

Judges in pieces, so that the largest prefill leaves room for other processes. Nothing of
``ascend_patch`` is imported here.
"""

from __future__ import annotations

import torch
from rope_oracle import axis_of_frequency

# Explicit mantissa bits and the smallest normal exponent.
_FORMATS = {torch.bfloat16: (7, -126), torch.float16: (10, -14), torch.float32: (23, -126)}
_FP32_EPSILON = 2.0**-23
_PIECE = 2**23


def phases(positions, cache, section=None, interleaved=False):
    """cos + i sin of each token and frequency, complex128 [T, rotary_dim/2]."""
    half = cache.shape[1] // 2
    table = torch.complex(cache[:, :half].double(), cache[:, half:].double())
    if section is None or positions.dim() == 1:
        return table[positions.reshape(-1).long()]
    axes = torch.tensor(axis_of_frequency(section, interleaved, half), device=cache.device)
    rows = positions.long()[axes].t()
    return table[rows, torch.arange(half, device=cache.device)]


def ulp(x, dtype):
    """The distance between neighbours of ``dtype`` at the magnitude of each element."""
    bits, lowest = _FORMATS[dtype]
    exponent = torch.frexp(x)[1] - 1
    exponent = torch.where(x == 0, lowest, exponent).clamp(min=lowest)
    return torch.exp2((exponent - bits).double())


def judge(got, x, phase, head_size: int, is_neox_style: bool, roundings: int = 1) -> None:
    """AssertionError unless got [T, H*D] is x turned by phase: the bounds of rope_oracle.

    ``roundings``: 4 fp32 epsilons of the pair are allowed for each.
    """
    tokens = x.shape[0]
    assert got.shape == x.shape
    outside = total = 0
    step = max(1, _PIECE // max(x.shape[1:].numel(), 1))
    for start in range(0, tokens, step):
        piece = slice(start, start + step)
        n = _judge_piece(got[piece], x[piece], phase[piece], head_size, is_neox_style, roundings)
        outside, total = outside + n[0], total + n[1]
    allowed = max(4, total // 1000)
    assert outside <= allowed, f"{outside} of {total} elements are not within one ulp"


def _judge_piece(got, x, phase, head_size, is_neox_style, roundings) -> tuple[int, int]:
    half = phase.shape[1]
    shape = (x.shape[0], x.shape[1] // head_size, head_size)
    heads, found = x.double().reshape(shape), got.double().reshape(shape)
    if is_neox_style:
        a, b = slice(0, half), slice(half, 2 * half)
    else:
        a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    z = torch.complex(heads[..., a].contiguous(), heads[..., b].contiguous()) * phase[:, None]
    weight = heads[..., a].abs() + heads[..., b].abs()
    slack = ulp(weight, got.dtype) if got.dtype == torch.float32 else None
    outside = 0
    for part, want in ((a, z.real), (b, z.imag)):
        error = (found[..., part] - want).abs()
        unit = ulp(want, got.dtype)
        # `not <=` so that an element that nobody wrote, NaN, is out of bounds too.
        bad = ~(error <= unit + 4 * roundings * _FP32_EPSILON * weight)
        if bad.any():
            raise AssertionError(f"{int(bad.sum())} elements are out of bounds")
        strict = unit if slack is None else torch.maximum(unit, slack)
        outside += int((error > strict).sum())
    rest = slice(2 * half, None)
    assert torch.equal(found[..., rest], heads[..., rest]), "elements past rotary_dim changed"
    return outside, found.numel()

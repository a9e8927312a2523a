"""What is right: heads as complex numbers in float64. It shares nothing with any implementation."""

from __future__ import annotations

import numpy
import torch


def angles(rows: int, rotary_dim: int, base: float = 10000.0) -> numpy.ndarray:
    """The angle of each position and frequency, float64 [rows, rotary_dim / 2]."""
    return numpy.arange(rows)[:, None] / base ** (numpy.arange(0, rotary_dim, 2) / rotary_dim)


def cache(rows: int, rotary_dim: int, dtype: torch.dtype, base: float = 10000.0) -> torch.Tensor:
    """cos_sin_cache as vLLM lays it out: [rows, rotary_dim], cosines and then sines."""
    turns = angles(rows, rotary_dim, base)
    both = numpy.concatenate([numpy.cos(turns), numpy.sin(turns)], axis=-1)
    return torch.from_numpy(both).to(dtype)


def turns_of(rows: torch.Tensor) -> numpy.ndarray:
    """Rows of a cache as complex numbers of about unit length: [..., rotary_dim / 2]."""
    cos, sin = numpy.split(rows.double().numpy(), 2, axis=-1)
    return cos + 1j * sin


def by_axis(turns: numpy.ndarray, section: list[int], interleaved: bool) -> numpy.ndarray:
    """[3, T, half] of time, height and width -> [T, half], a frequency from the axis it follows."""
    half = turns.shape[-1]
    if interleaved:
        axes = [
            frequency % 3 if frequency < 3 * section[frequency % 3] else 0
            for frequency in range(half)
        ]
    else:
        axes = [axis for axis, size in enumerate(section) for _ in range(size)]
    return numpy.stack([turns[axis, :, f] for f, axis in enumerate(axes)], axis=-1)


def rotate(heads: numpy.ndarray, turns: numpy.ndarray, neox: bool = True) -> numpy.ndarray:
    """heads [..., head_size] times turns [..., half]: a head's first 2 * half elements turn."""
    half, out = turns.shape[-1], heads.astype(numpy.float64, copy=True)
    pairs = (
        (slice(0, half), slice(half, 2 * half))
        if neox
        else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    turned = (out[..., pairs[0]] + 1j * out[..., pairs[1]]) * turns
    out[..., pairs[0]], out[..., pairs[1]] = turned.real, turned.imag
    return out


def normalised(
    heads: numpy.ndarray, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> numpy.ndarray:
    """RMSNorm of each head, in float64."""
    size = numpy.sqrt(numpy.mean(heads * heads, axis=-1, keepdims=True) + eps)
    heads = heads / size * weight.double().numpy()
    return heads if bias is None else heads + bias.double().numpy()


def split_normalise_rotate(
    qkv: torch.Tensor,
    turns: numpy.ndarray,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    heads: tuple[int, int],
    size: int,
    eps: float,
    gate: bool = False,
) -> list[numpy.ndarray]:
    """The fused operators' results: q, k, v and, with `gate`, the gates, all [T, heads * size]."""
    tokens, (queries, keys) = qkv.shape[0], heads
    blocks = qkv.double().numpy().reshape(tokens, -1 if tokens else qkv.shape[1] // size, size)
    cut = queries * (2 if gate else 1)
    q, k, v = blocks[:, :cut], blocks[:, cut : cut + keys], blocks[:, cut + keys :]
    found = [
        rotate(normalised(x, weight, bias, eps), turns[:, None])
        for x, weight, bias in zip((q[:, ::2] if gate else q, k), weights, biases, strict=True)
    ]
    found += [v, q[:, 1::2]] if gate else [v]
    return [x.reshape(tokens, x.shape[1] * size) for x in found]


def error(found: torch.Tensor, expected: numpy.ndarray) -> float:
    """The largest error in units of the dtype's spacing at the expected value, or at 1."""
    wanted = expected.reshape(tuple(found.shape))
    if not found.numel():
        return 0.0
    unit = torch.finfo(found.dtype).eps * numpy.maximum(numpy.abs(wanted), 1.0)
    with numpy.errstate(invalid="ignore"):
        worst = numpy.max(numpy.abs(found.double().numpy() - wanted) / unit)
    return float(worst) if numpy.isfinite(worst) else 1e9

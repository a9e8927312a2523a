"""The rotary operators in float64 on the CPU, by a formula of its own.

A pair (a, b) is the complex number a + ib, and its rotation the product with cos + i sin. The
reference, which multiplies and adds real numbers in float32, has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.selftest import Expected


def phases(
    positions: Tensor,
    cos_sin_cache: Tensor,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """cos + i sin of each token and frequency: complex128 [T, rotary_dim/2] on the CPU.

    Takes what ``rotary_embedding`` takes. Only the rows of the cache that are asked for are moved.
    """
    half = cos_sin_cache.shape[1] // 2
    rows = positions.reshape(-1) if mrope_section is None else positions
    table = cos_sin_cache.index_select(0, rows.reshape(-1).to(torch.int64))
    table = table.to("cpu", torch.float64).reshape(*rows.shape, 2 * half)
    phase = torch.complex(table[..., :half].contiguous(), table[..., half:].contiguous())
    if mrope_section is None or phase.dim() == 2:
        return phase
    axes = _axis_of_frequency(mrope_section, mrope_interleaved, half)
    return torch.stack([phase[axis, :, j] for j, axis in enumerate(axes)], dim=-1)


def _axis_of_frequency(section: Sequence[int], interleaved: bool, half: int) -> list[int]:
    """Which row of positions each frequency reads, dealt out one by one."""
    if not interleaved:
        return [axis for axis, size in enumerate(section) for _ in range(size)]
    axes = [0] * half
    for axis in (1, 2):
        for turn in range(section[axis]):
            if axis + 3 * turn < half:
                axes[axis + 3 * turn] = axis
    return axes


def rotated(x: Tensor, phase: Tensor, head_size: int, is_neox_style: bool) -> Expected:
    """``x`` [T, H*D] or [T, H, D], of any dtype and device, turned by ``phase``."""
    half = phase.shape[1]
    heads = _heads(x, head_size)
    pair = torch.arange(half, device="cpu")
    a = pair if is_neox_style else 2 * pair
    b = a + half if is_neox_style else a + 1
    turned = torch.complex(heads[..., a], heads[..., b]) * phase.unsqueeze(1)
    value, weight = heads.clone(), torch.zeros_like(heads)
    value[..., a], value[..., b] = turned.real, turned.imag
    weight[..., a] = weight[..., b] = heads[..., a].abs() + heads[..., b].abs()
    return Expected(value.reshape(x.shape), weight.reshape(x.shape))


def _heads(x: Tensor, head_size: int) -> Tensor:
    """[T, H, D] in float64 on the CPU; the heads are counted, as -1 means nothing for T = 0."""
    count = x.shape[1] if x.dim() == 3 else x.shape[1] // head_size
    return x.detach().to("cpu", torch.float64).reshape(x.shape[0], count, head_size)


def fused_expected(
    call: Sequence[Tensor], biases: dict[str, Tensor], options: dict[str, Any]
) -> list[Expected]:
    """What query, key, value and, with ``has_gate``, gate must be, each [T, heads * head_size]."""
    qkv, positions, cos_sin_cache, q_weight, k_weight = call
    size, queries, keys = (options[n] for n in ("head_size", "num_q_heads", "num_kv_heads"))
    wide = _heads(qkv, size)
    step = 2 if options["has_gate"] else 1
    q, k, v = wide.split((step * queries, keys, keys), dim=1)
    sections = options["mrope_section"], options["mrope_interleaved"]
    phase = phases(positions, cos_sin_cache, *sections)
    found = []
    for x, weight, name in ((q[:, ::step], q_weight, "q_bias"), (k, k_weight, "k_bias")):
        scale = weight.to("cpu", torch.float64) + options["weight_offset"]
        norm = torch.sqrt(x.square().mean(dim=-1, keepdim=True) + options["eps"])
        x = x / norm * scale
        bias = torch.zeros(size, dtype=torch.float64, device="cpu")
        bias = biases[name].to("cpu", torch.float64) if name in biases else bias
        value = rotated((x + bias).flatten(1), phase, size, options["is_neox_style"]).value
        # The norm comes before the rotation: 4 epsilons become 12, of what is added up.
        raw = (x.abs() + bias.abs()).flatten(1)
        pairs = rotated(raw, phase, size, options["is_neox_style"]).weight
        found.append(Expected(value, 3 * torch.maximum(pairs, raw)))
    copied = [v, q[:, 1::2]] if options["has_gate"] else [v]
    exact = (x.flatten(1) for x in copied)
    return found + [Expected(x, torch.zeros_like(x)) for x in exact]


def angles_expected(x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> Expected:
    """What apply_rotary must give for ``x`` [(b,) s, h, d] and angles [(b,) s, rotary_dim/2]."""
    places = x.shape[:-2]
    half = cos.shape[-1]
    parts = (part.detach().to("cpu", torch.float64) for part in (cos, sin))
    phase = torch.complex(*parts).expand(*places, half).reshape(places.numel(), half)
    rows = x.reshape(places.numel(), *x.shape[-2:])
    found = rotated(rows, phase, x.shape[-1], is_neox_style)
    return Expected(found.value.reshape(x.shape), found.weight.reshape(x.shape))

"""Rotary position embedding: float32 arithmetic, each output rounded once.

Formula, of torch_npu's documentation: x * cos + rotate(x) * sin. In mode "half" (NeoX style)
rotate(x) = cat(-second half, first half); in mode "interleave" (GPT-J style) each pair (a, b) of
neighbours becomes (-b, a).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import rotary_checks as checks
from ascend_patch.kernels.npu_ops import rotary_mul_checks


def _rotate(x: Tensor, half: bool) -> Tensor:
    if half:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """x [..., D] by cos and sin that broadcast to it; in x's dtype."""
    wide = x.float()
    return (wide * cos.float() + _rotate(wide, half) * sin.float()).to(x.dtype)


def _full(angles: Tensor, half: bool) -> Tensor:
    """[..., D/2] -> [..., D]: one entry for each element of a head."""
    return torch.cat((angles, angles), -1) if half else angles.repeat_interleave(2, -1)


def npu_rotary_mul(
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """input * r1 + rotate(input) * r2; input 4-D, or 3-D as TND; r1 and r2 broadcast to it.

    ``rotate``: [D, D], by which rotate(x) = x @ rotate instead, since torch_npu 2.10. r1 and r2 of
    another dtype are rounded to input's first, as torch_npu's adapter casts them.
    Raises OperatorError for what the documentation rules out.
    """
    rotary_mul_checks.rotary_mul(input, r1, r2, rotary_mode, rotate)
    cos, sin = r1.to(input.dtype), r2.to(input.dtype)
    if rotate is None:
        return _turn(input, cos, sin, rotary_mode == "half")
    wide = input.float()
    return (wide * cos.float() + wide @ rotate.float() * sin.float()).to(input.dtype)


def npu_apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    """query [B, S, N, D] and key by cos, sin [B, S, 1, D], or TND; both are changed in place.

    The schema does not say that they are changed, the documentation does. torch_npu returns the
    very tensors; these are copies, for an operator of PyTorch may not return what it is given.
    Raises OperatorError for what the documentation rules out.
    """
    checks.apply_rotary_pos_emb(query, key, cos, sin, layout, rotary_mode)
    for x in (query, key):
        x.copy_(_turn(x, cos, sin, True))
    return query.clone(), key.clone()


def npu_mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """query [T, Hq * head_size] and key by the rows of a cache [P, rotary_dim] at positions.

    ``positions``: [T], or [3, T] or [4, T] with as many sections, whose sum is rotary_dim / 2. A
    section's columns come from its own row of positions, one section after another, or in turns
    with ``cache_mode="interleave"``. No section, or zeros, is plain RoPE.
    Raises OperatorError for what the documentation rules out.
    """
    sections = checks.mrope(
        positions, query, key, cos_sin_cache, head_size, mrope_section, rotary_mode, cache_mode
    )
    half = rotary_mode in (None, "half")
    # [T, rotary_dim/2], or [axes, T, rotary_dim/2]
    cos, sin = cos_sin_cache[positions.long()].float().chunk(2, -1)
    if sections:
        axes = _axes(sections, cache_mode == "interleave")
        columns = torch.arange(axes.numel())
        cos, sin = (angles[axes, :, columns].t() for angles in (cos, sin))
    cos, sin = (_full(angles, half)[:, None] for angles in (cos, sin))
    width = cos_sin_cache.shape[1]
    query_out = _turn_part(query, cos, sin, head_size, width, half)
    return query_out, _turn_part(key, cos, sin, head_size, width, half)


def _axes(sections: Sequence[int], interleaved: bool) -> Tensor:
    """Which row of positions drives each column of a half."""
    columns = torch.arange(sum(sections))
    if not interleaved:
        return torch.repeat_interleave(torch.tensor(sections))
    # Height's section bounds width's turns too, as the documentation's formula has it.
    turns = columns % 3
    return torch.where(columns < 3 * sections[1], turns, 0)


def _turn_part(
    x: Tensor, cos: Tensor, sin: Tensor, head_size: int, width: int, half: bool
) -> Tensor:
    """x [T, H * head_size], of whose heads the first ``width`` elements turn."""
    heads = x.unflatten(-1, (-1, head_size))
    turned = _turn(heads[..., :width], cos, sin, half)
    return torch.cat((turned, heads[..., width:]), -1).flatten(1)


def _npu_rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox_style: bool,
) -> None:
    """query [T, Hq * D] and key [T, Hk * D] by the rows of a cache [P, D], in place.

    A head is as wide as the cache, whatever ``head_size`` says: the kernel behind it, ATB's Rope,
    takes a head's width from the cosines that it is given. ``head_size`` is only its rotary
    coefficient in GPT-J style, and must then be that width.
    Raises OperatorError for what that kernel refuses.
    """
    checks.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox_style)
    width = cos_sin_cache.shape[1]
    rows = cos_sin_cache[positions.flatten().long()]
    cos, sin = (_full(angles, is_neox_style)[:, None] for angles in rows.chunk(2, -1))
    for x in (query, key):
        heads = x.reshape(rows.shape[0], -1, width)
        x.copy_(_turn(heads, cos, sin, is_neox_style).view(x.shape))


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_rotary_mul": npu_rotary_mul,
    "npu::npu_apply_rotary_pos_emb": npu_apply_rotary_pos_emb,
    "npu::npu_mrope": npu_mrope,
    "atb::_npu_rotary_embedding": _npu_rotary_embedding,
}

"""The torch reference of rotary position embedding: fp32 arithmetic, any device.

It is the yardstick of the other implementations, so it prefers being obvious to being fast. It does
no host read and no host-to-device copy, and may therefore run while a device graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frequency_axes(
    mrope_section: Sequence[int], interleaved: bool, half: int, device: torch.device
) -> Tensor:
    """Which position row (0 time, 1 height, 2 width) drives each frequency; int64 [half].

    Chunked (Qwen2-VL, arXiv:2409.12191): t frequencies follow time, the next h height, then width.
    Interleaved (Qwen3-VL): frequency j follows row ``j % 3`` while that row's budget of section
    entries lasts, and time once it is spent. Entries beyond ``half`` have no frequency and drop.
    """
    # Built from arange on the device: a list would be copied from the host, which a graph capture
    # does not allow.
    frequency = torch.arange(half, device=device)
    time, height, width = mrope_section
    if not interleaved:
        return (frequency >= time).long() + (frequency >= time + height).long()
    turn = frequency % 3
    by_height = (turn == 1) & (frequency < 3 * height)
    by_width = (turn == 2) & (frequency < 3 * width)
    return by_height.long() + 2 * by_width.long()


def gather_cos_sin(
    positions: Tensor,
    cos_sin_cache: Tensor,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each token's angles: (cos, sin), float32 [T, rotary_dim/2].

    positions: [T] or anything that flattens to it, or [3, T] with ``mrope_section``.
    Positions outside the cache are moved to its nearest row.
    """
    rows, rotary_dim = cos_sin_cache.shape
    half = rotary_dim // 2
    positions = positions.clamp(0, rows - 1)
    if mrope_section is None or positions.dim() == 1:
        # Text under MRoPE: three equal rows, so each frequency finds the same position.
        angles = cos_sin_cache.index_select(0, positions.reshape(-1)).float()
        return angles[:, :half], angles[:, half:]
    axes = frequency_axes(mrope_section, mrope_interleaved, half, positions.device)
    # [half, T] -> [T, half]: for token i and frequency j, the row of the cache to read column j of.
    index = positions.index_select(0, axes).t().long()
    cos = torch.gather(cos_sin_cache[:, :half], 0, index)
    sin = torch.gather(cos_sin_cache[:, half:], 0, index)
    return cos.float(), sin.float()


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> None:
    """Write the rotated ``x`` to ``out``, which may be ``x`` itself.

    x, out: [..., head_size]; cos, sin: float32, broadcastable to [..., rotary_dim/2].
    A pair (a, b) becomes (a cos - b sin, b cos + a sin) (RoFormer, arXiv:2104.09864, eq. 34). Pairs
    are (j, j + rotary_dim/2) in NeoX style and (2j, 2j + 1) in GPT-J style.
    """
    half = cos.shape[-1]
    rotary_dim = 2 * half
    if is_neox_style:
        first, second = slice(0, half), slice(half, rotary_dim)
    else:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    a, b = x[..., first].float(), x[..., second].float()
    # Both results exist before either is stored: in place, the store destroys an input.
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    out[..., first].copy_(rotated_a)
    out[..., second].copy_(rotated_b)
    if out is not x and rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])


def apply_rotary_into(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool
) -> None:
    """Rotate x [(b,) s, h, d] by cos, sin [(b,) s, rotary_dim/2] into ``out``, of x's shape."""
    # [(b,) s, half] -> [(b,) s, 1, half]; [s, 1, half] broadcasts over the batch by itself.
    rotate_into(out, x, cos.float().unsqueeze(-2), sin.float().unsqueeze(-2), is_neox_style)


def rotary_embedding_into(
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> None:
    """Rotate query and key into the given outputs, which may be the inputs themselves.

    The signature that every implementation of ``rotary_embedding`` shares; arguments are as in
    ``ascend_patch.kernels.rope.rotary_embedding`` and have been validated.
    """
    cos, sin = gather_cos_sin(positions, cos_sin_cache, mrope_section, mrope_interleaved)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same angle for each head
    _rotate_heads(out_query, query, cos, sin, head_size, is_neox_style)
    if key is not None and out_key is not None:
        _rotate_heads(out_key, key, cos, sin, head_size, is_neox_style)


def _rotate_heads(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, head_size: int, is_neox_style: bool
) -> None:
    in_place = out is x
    x = _split_heads(x, head_size)
    rotate_into(x if in_place else _split_heads(out, head_size), x, cos, sin, is_neox_style)


def _split_heads(x: Tensor, head_size: int) -> Tensor:
    """[T, H*D] or [T, H, D] -> [T, H, D], always a view: splitting a dimension never copies."""
    if x.dim() == 3:
        return x
    # The number of heads is spelled out because -1 is ambiguous for T = 0.
    return x.view(x.shape[0], x.shape[1] // head_size, head_size)

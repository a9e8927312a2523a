"""The torch reference of split_qkv_rmsnorm_rope: fp32 arithmetic, one rounding, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch.kernels.rope.reference import gather_cos_sin, rotate_into


def split_heads(
    qkv: Tensor, num_q_heads: int, num_kv_heads: int, head_size: int, has_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Views [T, heads, head_size] of query, key, value and, with ``has_gate``, gate.

    A query head and its gate lie side by side: [q0, gate0, q1, gate1, ..., k, v].
    """
    tokens = qkv.shape[0]
    queries = num_q_heads * (2 if has_gate else 1)
    heads = qkv.view(tokens, queries + 2 * num_kv_heads, head_size)
    q, k, v = heads.split((queries, num_kv_heads, num_kv_heads), dim=1)
    return (q[:, ::2], k, v, q[:, 1::2]) if has_gate else (q, k, v, None)


def split_qkv_rmsnorm_rope_into(
    out_q: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    out_gate: Tensor | None,
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    eps: float,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
    weight_offset: float,
) -> None:
    """Write the four results; the signature that every implementation shares."""
    q, k, v, gate = split_heads(qkv, num_q_heads, num_kv_heads, head_size, out_gate is not None)
    angles = gather_cos_sin(positions, cos_sin_cache, mrope_section, mrope_interleaved)
    cos, sin = (angle.unsqueeze(1) for angle in angles)
    for out, x, weight, bias in ((out_q, q, q_weight, q_bias), (out_k, k, k_weight, k_bias)):
        heads = x.float()
        heads = heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + eps)
        heads = heads * (weight.float() + weight_offset)
        if bias is not None:
            heads = heads + bias.float()
        turned = torch.empty_like(heads)
        rotate_into(turned, heads, cos, sin, is_neox_style)
        out.copy_(turned.flatten(1))
    out_v.copy_(v.flatten(1))
    if out_gate is not None and gate is not None:
        out_gate.copy_(gate.flatten(1))

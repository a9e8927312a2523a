"""Rotary position embedding: functional, in place, and on given angles.

Each function goes through a registered operator (see ``ops``) to the implementation that
``dispatch`` picks for the tensors' device.

A position outside the cache is moved to its nearest row, on every device: nothing outside the cache
is ever read. The checked mode (``check=True``, or ASCEND_PATCHES_CHECK=1 in the environment) turns
such a position into a ValueError. It waits for the device, so it is off under torch.compile and
while a device graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch.kernels.rope import angles_ops, checks, fused_ops, ops

__all__ = ["apply_rotary", "rotary_embedding", "rotary_embedding_", "split_qkv_rmsnorm_rope"]

ops.register_operators()
fused_ops.register_operator()
angles_ops.register_operator()


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    check: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate query and key by their tokens' positions; the inputs stay as they are.

    Args:
        positions: [T], or any shape with T elements; int32 or int64. With ``mrope_section``: [3, T]
            (time, height, width), or [T] for text, which counts as three equal rows.
        query: [T, Hq * head_size] or [T, Hq, head_size]; bfloat16, float16 or float32. Any strides:
            a slice of qkv is read where it lies.
        key: the same with Hk heads, or None where another layer's key is shared.
        cos_sin_cache: [max_position, rotary_dim], any floating dtype; cosines in the first half of
            a row, sines in the second. rotary_dim is even and at most head_size; elements of a head
            past it are copied bit by bit.
        head_size: elements in a head.
        is_neox_style: pairs are (j, j + rotary_dim/2) if true, (2j, 2j + 1) if not (GPT-J).
        mrope_section: [t, h, w] frequencies for each row of positions; t + h + w = rotary_dim / 2.
        mrope_interleaved: rows take turns frequency by frequency (Qwen3-VL) instead of in three
            chunks (Qwen2-VL).
        check: the checked mode on or off; None leaves it to ASCEND_PATCHES_CHECK.

    Returns:
        (query, key): new, contiguous, in the shapes and dtype of the inputs; None for key None.
        Arithmetic is float32, rounded once.

    Raises:
        TypeError: a dtype outside the above.
        ValueError: shapes or devices that do not fit; a tensor that requires a gradient; in the
            checked mode, a position that has no row in the cache.

    Source: RoFormer, arXiv:2104.09864, eq. 34; MRoPE: Qwen2-VL, arXiv:2409.12191, section 2.1.
    """
    if not torch.compiler.is_compiling() and checks.checked(check):
        checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)
        checks.check_positions(positions, cos_sin_cache)
    rotated_query, rotated_key = torch.ops.ascend_patch.rotary_embedding.default(
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
    )
    return rotated_query, None if key is None else rotated_key


def rotary_embedding_(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    check: bool | None = None,
) -> None:
    """Rotate query and key in place; arguments, errors and results are rotary_embedding's.

    For eager code. In a compiled graph it is correct, but functionalisation clones around it: use
    ``rotary_embedding`` there. query and key must not overlap, and
    neither be expanded: ValueError.
    """
    if not torch.compiler.is_compiling() and checks.checked(check):
        checks.check_call(positions, query, key, cos_sin_cache, head_size, mrope_section)
        checks.check_positions(positions, cos_sin_cache)
    torch.ops.ascend_patch.rotary_embedding_.default(
        positions,
        query,
        key,
        cos_sin_cache,
        head_size,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
    )


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, is_neox_style: bool) -> Tensor:
    """Rotate the heads of ``x`` by given angles, as vision towers do.

    Args:
        x: [b, s, h, d] or [s, h, d]; bfloat16, float16 or float32; any strides.
        cos, sin: [s, rotary_dim/2], or [b, s, rotary_dim/2] for angles of each batch entry; any
            floating dtype. Elements of a head past rotary_dim are copied.
        is_neox_style: pairs are (j, j + rotary_dim/2) if true, (2j, 2j + 1) if not.

    Returns:
        A new contiguous tensor of x's shape and dtype; arithmetic is float32, rounded once.

    Raises:
        TypeError: x, cos or sin is not floating point.
        ValueError: shapes or devices that do not fit, or a tensor that requires a gradient.

    Source: RoFormer, arXiv:2104.09864, eq. 34.
    """
    rotated: Tensor = torch.ops.ascend_patch.apply_rotary.default(x, cos, sin, is_neox_style)
    return rotated


def split_qkv_rmsnorm_rope(
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    eps: float,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    is_neox_style: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    weight_offset: float = 0.0,
    has_gate: bool = False,
) -> tuple[Tensor, ...]:
    """Split qkv, normalise each head of q and k by its root mean square, and rotate them.

    Args:
        qkv: [T, (Hq + 2 Hk) * head_size]; bfloat16, float16 or float32. With ``has_gate`` a query
            head is followed by its gate, so it is [T, (2 Hq + 2 Hk) * head_size] (Qwen3-Next).
        positions, cos_sin_cache, is_neox_style, mrope_section, mrope_interleaved: as in
            ``rotary_embedding``.
        q_weight, k_weight: [head_size], any floating dtype; ``weight_offset`` is added to both
            (1.0 where a checkpoint stores weight - 1, as Qwen3.5's does).
        eps: added to the mean of squares.
        q_bias, k_bias: [head_size], added after the weight.

    Returns:
        (q, k, v), or (q, k, v, gate) with ``has_gate``: new and contiguous, [T, heads * head_size].
        Arithmetic is float32 throughout, rounded once; v and gate are copies.

    Raises:
        TypeError: a dtype outside the above.
        ValueError: shapes or devices that do not fit, or a tensor that requires a gradient.

    Source: RMSNorm, arXiv:1910.07467, eq. 4; then as ``rotary_embedding``.
    """
    results = torch.ops.ascend_patch.split_qkv_rmsnorm_rope.default(
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        q_bias,
        k_bias,
        num_q_heads,
        num_kv_heads,
        head_size,
        eps,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
        weight_offset,
        has_gate,
    )
    return tuple(results) if has_gate else tuple(results[:3])

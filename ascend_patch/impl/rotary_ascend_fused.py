"""vllm-ascend's fused operators (split qkv, normalise q and k, rotate), where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.rope import split_qkv_rmsnorm_rope

# What the release lets a tile of tokens take of a vector core's memory, in bytes.
TILE_BYTES = 85 * 1024


def tokens_in_a_tile(q_size: int, kv_size: int, head_dim: int, rope_dim: int, itemsize: int) -> int:
    """How many tokens the release's kernel takes at a time on a vector core; its own estimate."""
    if rope_dim == head_dim:
        angles = 2 * rope_dim + (q_size // head_dim * rope_dim) // 2
    else:
        angles = 4 * rope_dim + q_size // head_dim * rope_dim
    return max(1, TILE_BYTES // itemsize // (5 * q_size + 3 * kv_size + angles))


def is_written_for(*tensors: Tensor) -> bool:
    """Whether the release's kernels fit: they round to bfloat16 inside, and read rows by width."""
    return all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in tensors)


def qkv_rmsnorm_rope(original: FunctionType) -> Any:
    """`vllm::qkv_rmsnorm_rope` of 0.18.0 and 0.23.0."""

    def choose(qkv: Tensor, rope_dim: int, sizes: tuple[int, int, int]) -> Any:
        cores = original.__globals__["get_vectorcore_num"]()
        one_tile = -(-qkv.shape[0] // cores) <= tokens_in_a_tile(*sizes, rope_dim, 2)
        return original if one_tile else _one_by_one

    return _given_a_cache(choose)


def qkv_rmsnorm_rope_branch_0_13(original: FunctionType) -> Any:
    """`vllm::qkv_rmsnorm_rope` of releases/v0.13.0: cos_sin_cache and positions, whole heads."""

    def choose(_qkv: Tensor, rope_dim: int, sizes: tuple[int, int, int]) -> Any:
        right = rope_dim == sizes[-1] and takes_heads(original, *sizes)
        return original if right else _fused

    return _given_a_cache(choose)


def _given_a_cache(choose: Callable[[Tensor, int, tuple[int, int, int]], Any]) -> Any:
    """The operator that is given cos_sin_cache and positions.

    ``choose`` says who runs what the release's kernel was written for, by qkv, rotary_dim and the
    sizes (q, kv, head); all else is ours.
    """

    def split_qkv_rmsnorm_rope_impl(
        input: Tensor,
        cos_sin_cache: Tensor,
        positions: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_hidden_size: int,
        kv_hidden_size: int,
        head_dim: int,
        eps: float,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
    ) -> Any:
        sizes = (q_hidden_size, kv_hidden_size, head_dim)
        fits = is_written_for(input, cos_sin_cache) and positions.is_contiguous()
        both = (q_bias is None) == (k_bias is None)
        run = choose(input, cos_sin_cache.shape[-1], sizes) if fits and both else _fused
        return run(input, cos_sin_cache, positions, q_weight, k_weight, *sizes, eps, q_bias, k_bias)

    return split_qkv_rmsnorm_rope_impl


def qkv_rmsnorm_rope_0_13(original: FunctionType) -> Any:
    """`vllm::qkv_rmsnorm_rope` of 0.13.0, which is given each token's sines and cosines."""

    def split_qkv_rmsnorm_rope_impl(
        input: Tensor,
        sin: Tensor,
        cos: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        q_hidden_size: int,
        kv_hidden_size: int,
        head_dim: int,
        eps: float,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
    ) -> Any:
        sizes = (q_hidden_size, kv_hidden_size, head_dim)
        right = is_written_for(input, sin, cos) and takes_heads(original, *sizes)
        if not right or (q_bias is None) != (k_bias is None):
            # Both are as wide as a head, each angle twice: [..., head_dim] -> [T, head_dim / 2].
            halves = [x.reshape(-1, head_dim)[:, : head_dim // 2] for x in (cos, sin)]
            angles = torch.cat(halves, dim=-1)
            rows = torch.arange(input.shape[0], device=input.device)
            return _fused(input, angles, rows, q_weight, k_weight, *sizes, eps, q_bias, k_bias)
        return original(input, sin, cos, q_weight, k_weight, *sizes, eps, q_bias, k_bias)

    return split_qkv_rmsnorm_rope_impl


def takes_heads(original: FunctionType, q_size: int, kv_size: int, head_dim: int) -> bool:
    """Whether 0.13's kernel takes these heads; it asserts that they divide its vector cores."""
    kv_heads = kv_size // head_dim
    cores = original.__globals__["get_vectorcore_num"]()
    return head_dim & (head_dim - 1) == 0 and q_size % kv_size == 0 and cores % kv_heads == 0


def split_qkv_rmsnorm_mrope(original: FunctionType) -> Any:
    """`vllm::triton_split_qkv_rmsnorm_mrope` (Qwen3-VL, Qwen3.5) of 0.18.0 and 0.23.0."""

    def triton_split_qkv_rmsnorm_mrope(
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos_sin: Tensor,
        num_q_heads: int,
        num_kv_heads: int,
        head_size: int,
        eps: float,
        mrope_section: list[int],
        is_interleaved: bool,
        rope_dim: int | None = None,
        q_bias: Tensor | None = None,
        k_bias: Tensor | None = None,
        has_gate: bool = False,
    ) -> Any:
        width = head_size if rope_dim is None else rope_dim
        # Without an axis of their own (text: [T, rotary_dim]) the kernel reads past the angles.
        by_axis = cos_sin.dim() == 3 and cos_sin.shape[-1] == width
        both = (q_bias is None) == (k_bias is None)
        if by_axis and both and qkv.is_contiguous() and cos_sin.is_contiguous():
            return original(
                qkv,
                q_weight,
                k_weight,
                cos_sin,
                num_q_heads,
                num_kv_heads,
                head_size,
                eps,
                mrope_section,
                is_interleaved,
                rope_dim,
                q_bias,
                k_bias,
                has_gate,
            )
        angles, rows = _as_cache(cos_sin, qkv.shape[0])
        section: Sequence[int] | None = mrope_section if rows.dim() == 2 else None
        results = split_qkv_rmsnorm_rope(
            qkv.contiguous(),
            rows,
            angles,
            q_weight,
            k_weight,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            eps=eps,
            q_bias=q_bias,
            k_bias=k_bias,
            mrope_section=section,
            mrope_interleaved=is_interleaved,
            has_gate=has_gate,
        )
        return results if has_gate else (*results, qkv.new_empty(qkv.shape[0], 0))

    return triton_split_qkv_rmsnorm_mrope


def _as_cache(cos_sin: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Angles that are gathered already, as a cache of their own and each token's row in it."""
    rows = torch.arange(cos_sin.shape[:-1].numel(), device=cos_sin.device)
    rows = rows.view(3, tokens) if cos_sin.dim() == 3 else rows
    return cos_sin.reshape(-1, cos_sin.shape[-1]), rows


def _fused(
    qkv: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_size: int,
    kv_size: int,
    head_dim: int,
    eps: float,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """The bundled operator, for what the release's kernel gets wrong or does not take."""
    return split_qkv_rmsnorm_rope(
        qkv.contiguous(),
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        num_q_heads=q_size // head_dim,
        num_kv_heads=kv_size // head_dim,
        head_size=head_dim,
        eps=eps,
        q_bias=q_bias,
        k_bias=k_bias,
    )


def _one_by_one(
    qkv: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_size: int,
    kv_size: int,
    head_dim: int,
    eps: float,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The host's operators as they were before its fusion pass joined them.

    From the second tile of tokens on, the fused kernel reads a token's position from a buffer that
    is being loaded, with nothing to wait for the load (vllm-ascend #16674). It is exact on one
    tile; beyond, these three operators read each position straight from memory, and are the host's
    fast ones.
    """
    q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
    normalised = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        heads = x.unflatten(-1, (-1, head_dim))
        found = torch.ops.npu.npu_rms_norm(heads, weight, eps)[0]
        normalised.append((found if bias is None else found + bias).flatten(1))
    rope_dim = cos_sin_cache.shape[-1]
    q, k = torch.ops.vllm.npu_rotary_embedding(
        positions, *normalised, cos_sin_cache, head_dim, rope_dim, True
    )
    return q, k, v.contiguous()

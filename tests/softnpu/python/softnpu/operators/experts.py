"""Mixtures of experts by the all-gather path: which experts, in whose order, and their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require


def moe_gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [T, k], experts int32 [T, k], all scores float32 [T, E]) of logits x [T, E].

    Scores are the softmax where norm_type is 0, and the sigmoid where it is 1; weights are divided
    by their sum where it is the sigmoid, or where `renorm` is 1.
    """
    name = "moe_gating_top_k"
    plain = group_count == 1 and bias_opt is None
    require(plain, name, "groups of experts, and biases, are not implemented")
    require(norm_type in (0, 1), name, f"norm_type is {norm_type}, not 0 or 1")
    require(1 <= k <= x.shape[-1], name, f"k is {k}, of {x.shape[-1]} experts")
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    weights, experts = scores.topk(k, -1)
    if renorm or norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), scores


def npu_moe_init_routing_custom(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = 0,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows by expert [T * k, H], place of each (token, choice) int32 [T * k], counts, no scale).

    x [T, H], expert_idx [T, k]. Rows of experts outside `active_expert_range` come last; counts are
    int64, one for each expert of the range.
    """
    name = "npu_moe_init_routing_custom"
    modes = (quant_mode, drop_pad_mode, row_idx_type, expert_tokens_num_type)
    require(modes == (-1, 0, 0, 1), name, f"quantization, drop, row and count modes are {modes}")
    first, last = active_expert_range or (0, expert_num)
    require(0 <= first < last <= expert_num, name, f"experts {first} to {last} of {expert_num}")
    rows, choices = expert_idx.numel(), expert_idx.shape[1]
    none = x.new_empty(rows, dtype=torch.float32)
    if x.is_meta:
        place, count = x.new_empty(rows, dtype=torch.int32), x.new_empty(last - first)
        return x.new_empty(rows, x.shape[1]), place, count.long(), none
    flat = expert_idx.flatten().long()
    here = (flat >= first) & (flat < last)
    order = torch.where(here, flat, expert_num).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(rows)
    counts = torch.bincount(flat[here] - first, minlength=last - first)
    return x[order // choices], place.int(), counts, none


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **more: Any,
) -> list[Tensor]:
    """[[M, N]] of x [[M, K]] by rows: those of group e times weight[e], of weight [[E, K, N]].

    `group_list` [E] has the rows of each group (group_list_type 1) or its end (0). Rows behind the
    last group are zeros here, and undefined by the documentation.
    """
    name = "npu_grouped_matmul"
    given = {key for key, one in more.items() if one not in (None, 0, [])}
    require(not given, name, f"{', '.join(sorted(given))} are not implemented")
    single = len(x) == len(weight) == 1 and group_type == 0 and split_item in (2, 3)
    require(single, name, "only one x and one weight, split by rows into one result, are there")
    require(group_list is not None, name, "without group_list it is not implemented")
    rows, groups = x[0], weight[0]
    require(rows.shape[1] == groups.shape[1], name, f"x {rows.shape}, weight {groups.shape}")
    out = rows.new_zeros(rows.shape[0], groups.shape[2])
    if rows.is_meta:
        return [out]
    ends = (group_list.cumsum(0) if group_list_type == 1 else group_list).tolist()
    require(ends[-1] <= rows.shape[0], name, f"groups end at {ends[-1]}, x at {rows.shape[0]}")
    start = 0
    for e, end in enumerate(ends):
        found = rows[start:end].float() @ groups[e].float()
        out[start:end] = (found if not bias else found + bias[0][e].float()).to(out.dtype)
        start = end
    return [out]


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """[T, H]: of each token the sum of its rows, weighted by probs [T, k].

    permuted_tokens [T * k, H]; sorted_indices [T * k], the row of each (token, choice).
    """
    name = "npu_moe_token_unpermute"
    require(not padded_mode, name, "padded_mode is not implemented")
    choices = 1 if probs is None else probs.shape[1]
    rows = permuted_tokens[sorted_indices.long()].float().unflatten(0, (-1, choices))
    weighted = rows if probs is None else rows * probs.float()[..., None]
    return weighted.sum(1).to(permuted_tokens.dtype)


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_grouped_matmul": npu_grouped_matmul,
    "npu::npu_moe_token_unpermute": npu_moe_token_unpermute,
    "_C_ascend::moe_gating_top_k": moe_gating_top_k,
    "_C_ascend::npu_moe_init_routing_custom": npu_moe_init_routing_custom,
}

"""Top-k and top-p, and the embedding of a vocabulary that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require


def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """logits [B, V] with -inf for what is neither among the k [B] best nor in the nucleus p [B].

    The nucleus is the shortest row of best tokens whose probability reaches p, of those that top-k
    has left.
    """
    name = "npu_top_k_top_p"
    require(logits.dim() == 2, name, f"logits have {logits.dim()} dimensions, not 2")
    for what, one in (("p", p), ("k", k)):
        if one is not None:
            right = one.shape == logits.shape[:1]
            require(right, name, f"{what} {list(one.shape)} for logits {list(logits.shape)}")
    best, index = logits.float().sort(dim=-1, descending=True, stable=True)
    if k is not None:
        rank = torch.arange(logits.shape[-1], device=logits.device)
        best = best.masked_fill(rank >= k.long()[:, None], -torch.inf)
    if p is not None:
        probability = best.softmax(-1)
        before = probability.cumsum(-1) - probability
        best = best.masked_fill(before > p.float()[:, None], -torch.inf)
    return torch.empty_like(best).scatter_(-1, index, best).to(logits.dtype)


def get_masked_input_and_mask(
    input: Tensor,
    org_vocab_start_index: int,
    org_vocab_end_index: int,
    num_org_vocab_padding: int,
    added_vocab_start_index: int,
    added_vocab_end_index: int,
) -> tuple[Tensor, Tensor]:
    """(row of each token in this rank's embedding, or 0; whether it is another rank's) of ids.

    A rank has ids of the original vocabulary, then padding, then ids that were added to it.
    """
    original = (input >= org_vocab_start_index) & (input < org_vocab_end_index)
    added = (input >= added_vocab_start_index) & (input < added_vocab_end_index)
    size = org_vocab_end_index - org_vocab_start_index
    moved = added_vocab_start_index - size - num_org_vocab_padding
    offset = org_vocab_start_index * original + moved * added
    here = original | added
    return (here * (input - offset)).to(input.dtype), ~here


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_top_k_top_p": top_k_top_p,
    "_C_ascend::npu_apply_top_k_top_p": top_k_top_p,
    "_C_ascend::get_masked_input_and_mask": get_masked_input_and_mask,
}

"""vllm-ascend's layers, where they rotate in another way than they are asked to."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl.rotary_ascend import MODULE
from ascend_patch.kernels.rope import apply_rotary, rotary_embedding

# torch_npu's npu_rotary_mul, mode `half`: batch and heads below 1000, a head below 896 elements.
MOST_HEADS = 1000
WIDEST_HEAD = 896


def rotates_wrongly(is_neox_style: bool, x: Tensor, cos: Tensor, calls: int = 1) -> bool:
    """Whether npu_rotary_mul, as the release calls it, is not what was asked for.

    It is always told to pair (j, j + d/2), and given angles as [1, s, 1, d], made from [s, d/2]:
    one set for the whole batch, as wide as a head.

    Args:
        calls: Among how many calls the release shares the batch of a 4-D x.
    """
    heads, head_size = x.shape[-2:]
    batch = x.shape[0] // calls if x.dim() == 4 else 1
    one_set = cos.shape[:-1].numel() == x.shape[-3]
    limits = batch < MOST_HEADS and heads < MOST_HEADS and head_size < WIDEST_HEAD
    return not (is_neox_style and one_set and 2 * cos.shape[-1] == head_size and limits)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> Tensor:
    """The bundled operator, for angles in any of the shapes that the release takes."""
    if cos.shape[:-1].numel() == x.shape[-3]:
        # [1, s, d/2] or [s, 1, d/2] -> [s, d/2]: one set for the whole batch.
        cos, sin = (angles.reshape(-1, angles.shape[-1]) for angles in (cos, sin))
    return apply_rotary(x, cos, sin, is_neox_style=is_neox_style)


def apply_rotary_emb(original: FunctionType) -> Any:
    """`AscendApplyRotaryEmb.forward_oot` of 0.18.0 and 0.23.0."""

    def forward_oot(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if rotates_wrongly(self.is_neox_style, x, cos):
            return rotated(x, cos, sin, self.is_neox_style)
        return original(self, x, cos, sin)

    return forward_oot


def apply_rotary_emb_0_13(original: FunctionType) -> Any:
    """`AscendApplyRotaryEmb.forward_oot` of 0.13.0, which halves every batch into q and k."""

    def forward_oot(self: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if rotates_wrongly(self.is_neox_style, x, cos, calls=2):
            return rotated(x, cos, sin, self.is_neox_style)
        if x.dim() == 4 and x.shape[0] == 1:
            # q or k alone (Keye-VL): without a batch the release does not try to halve it.
            return original(self, x.squeeze(0), cos, sin).unsqueeze(0)
        if x.dim() == 4 and x.shape[0] % 2:
            return rotated(x, cos, sin, self.is_neox_style)
        return original(self, x, cos, sin)

    return forward_oot


def mrope(original: FunctionType) -> Any:
    """`AscendMRotaryEmbedding.forward_oot`; 0.11.0 has no Triton in it."""
    has_triton = bool(original.__globals__.get("HAS_TRITON"))

    def forward_oot(self: Any, positions: Tensor, query: Tensor, key: Tensor) -> Any:
        by_triton = has_triton and positions.dim() == 2 and self.mrope_interleaved
        by_operator = not by_triton and self.mrope_section == [16, 24, 24]
        # vLLM's Triton kernel and npu_mrope as it is called know one style; the latter no turns.
        wrong_style = not self.is_neox_style and (by_triton or by_operator)
        wrong_turns = by_operator and self.mrope_interleaved and positions.dim() == 2
        if wrong_style or wrong_turns:
            return rotary_embedding(
                positions,
                query,
                key,
                self.cos_sin_cache,
                head_size=self.head_size,
                is_neox_style=self.is_neox_style,
                mrope_section=self.mrope_section if positions.dim() == 2 else None,
                mrope_interleaved=self.mrope_interleaved,
            )
        return original(self, positions, query, key)

    return forward_oot


def without_a_key(original: FunctionType) -> Any:
    """`AscendRotaryEmbedding.forward_oot`: the operator behind it takes no None for a key.

    A layer that shares the keys of an earlier one rotates only queries. YaRN's class calls this
    method too.
    """
    context = original.__globals__.get("_EXTRA_CTX")

    def forward_oot(
        self: Any,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
        offsets: Tensor | None = None,
        is_neox_style_override: bool | None = None,
    ) -> Any:
        if key is not None:
            return original(self, positions, query, key, offsets, is_neox_style_override)
        neox = self.is_neox_style if is_neox_style_override is None else is_neox_style_override
        return rotary_embedding(
            _gathered(context, self, positions),
            query,
            None,
            self.cos_sin_cache,
            head_size=self.head_size,
            is_neox_style=neox,
        )

    return forward_oot


def _gathered(context: Any, layer: Any, positions: Tensor) -> Tensor:
    """Under flashcomm a draft model's positions are a rank's share; the release gathers them."""
    if context is None or not context.is_draft_model:
        return positions
    if not (layer.use_mtp and context.flash_comm_v1_enabled):
        return positions
    gather = torch.ops.vllm.maybe_all_gather_and_maybe_unpad
    found: Tensor = gather(positions.contiguous(), True)
    return found


def knows_its_method(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`AscendYaRNRotaryEmbedding.__init__` of 0.18.0: set what its forward reads in a draft model.

    The class borrows the forward of AscendRotaryEmbedding, which reads `use_mtp`, and does not set
    it: a draft model with YaRN ends in an AttributeError (vllm-ascend #8734).
    """
    wrapped(*args, **kwargs)
    # Not through `wrapped`: a subclass may call this by its class, and that one is no method.
    speculative = sys.modules[MODULE].get_current_vllm_config().speculative_config
    instance.use_mtp = speculative and speculative.method == "mtp"

"""Attention that normalises q and k and then rotates them, in one pass over qkv.

Qwen3 and Qwen3-MoE, and with MRotaryEmbedding the text models of Qwen3-VL.
"""

from __future__ import annotations

import os
from types import FunctionType
from typing import Any

from ascend_patch.impl.rotary import DEVICES as ALL_DEVICES
from ascend_patch.impl.rotary import DTYPES, cache_of
from ascend_patch.impl.rotary_sections import has_sections, sections
from ascend_patch.kernels.rope import split_qkv_rmsnorm_rope

# On a CPU there is no kernel to win with: the reference takes longer than vLLM's operators, and
# than what Inductor makes of its torch code.
DEVICES = tuple(device for device in ALL_DEVICES if device != "cpu")
# vLLM promises one result for every batch size, with kernels of its own.
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"


def forward(original: FunctionType) -> Any:
    """Qwen3Attention.forward and Qwen3MoeAttention.forward.

    What decides is the same in every call of a layer, so that a compiled forward has one of the two
    forms. Projections, attention and everything that quantisation or LoRA put in their place are
    called as the release calls them.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import (
        YaRNScalingRotaryEmbedding,
    )

    one_position = (RotaryEmbedding, YaRNScalingRotaryEmbedding, Llama3RotaryEmbedding)
    possible = os.environ.get(BATCH_INVARIANT, "") in ("", "0")

    def norm_fits(norm: Any, hidden_states: Any) -> bool:
        return (
            type(norm) is RMSNorm
            and norm.has_weight
            and norm.variance_size_override is None
            and norm.weight.dtype == hidden_states.dtype
        )

    def rotary_fits(rotary: Any, positions: Any, head_size: int) -> bool:
        if rotary.head_size != head_size:
            return False
        if type(rotary) is MRotaryEmbedding:
            return has_sections(rotary, positions)
        return type(rotary) in one_position and positions.dim() == 1

    def fits(layer: Any, positions: Any, hidden_states: Any) -> bool:
        return (
            possible
            and hidden_states.device.type in DEVICES
            and hidden_states.dim() == 2
            and hidden_states.dtype in DTYPES
            and not layer.dual_chunk_attention_config
            and norm_fits(layer.q_norm, hidden_states)
            and norm_fits(layer.k_norm, hidden_states)
            and layer.q_norm.variance_epsilon == layer.k_norm.variance_epsilon
            and rotary_fits(layer.rotary_emb, positions, layer.head_dim)
        )

    def forward(self: Any, positions: Any, hidden_states: Any) -> Any:
        if not fits(self, positions, hidden_states):
            return original(self, positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        rotary = self.rotary_emb
        by_section = sections(rotary, positions) if type(rotary) is MRotaryEmbedding else {}
        q, k, v = split_qkv_rmsnorm_rope(
            qkv,
            positions,
            cache_of(rotary, qkv),
            self.q_norm.weight,
            self.k_norm.weight,
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            eps=self.q_norm.variance_epsilon,
            is_neox_style=rotary.is_neox_style,
            **by_section,
        )
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    return forward

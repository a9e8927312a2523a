"""Tiny models with gated delta rule layers.

Their decay is slow in some heads and fast in others, so that what is said depends on tokens of
earlier chunks and blocks, and a lost state shows.
"""

from __future__ import annotations

from typing import Any

from _tiny_draw import Draw
from _tiny_parts import ATTENTION_GAIN, HEADS, HIDDEN, KV_HEADS, VALUE_GAIN, Kind, State

LAYER_TYPES = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
GDN_HEAD_DIM, PARTIAL = 128, 0.25
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 4, 64, 128, 4
EXPERTS, CHOSEN, EXPERT_INTERMEDIATE = 4, 2, 128
# A head's state halves in about 0.7 / A tokens.
DECAYS = (0.004, 0.03, 0.2, 1.5)
GATE_GAIN = 2.0


def qwen3_next_kind() -> Kind:
    """Return Qwen3-Next: three GDN layers and one of attention, each with experts behind it."""

    def config(_vocab: dict[str, int]) -> State:
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "head_dim": GDN_HEAD_DIM,
            "partial_rotary_factor": PARTIAL,
            "layer_types": list(LAYER_TYPES),
            "full_attention_interval": len(LAYER_TYPES),
            **linear_sizes(),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": EXPERT_INTERMEDIATE,
            "shared_expert_intermediate_size": EXPERT_INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "norm_topk_prob": True,
            "output_router_logits": False,
        }

    def weights(draw: Draw, layer: str) -> State:
        index = int(layer.split(".")[-2])
        full = LAYER_TYPES[index] == "full_attention"
        return {
            **(gated_attention(draw, layer) if full else gated_delta_net(draw, layer)),
            **experts(draw, layer),
            **offset_norms(draw, layer),
        }

    return Kind(config, weights, more=final_norm, layers=len(LAYER_TYPES))


def linear_sizes() -> State:
    """Return what a configuration says about GDN layers."""
    return {
        "linear_conv_kernel_dim": KERNEL,
        "linear_key_head_dim": KEY_DIM,
        "linear_value_head_dim": VALUE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
    }


def gated_delta_net(draw: Draw, layer: str) -> State:
    """Return one GDN layer: projections by key head, q k v z and b a within each."""
    gdn = layer + "linear_attn."
    keys, values = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
    return {
        gdn + "in_proj_qkvz.weight": draw.linear(2 * keys + 2 * values, HIDDEN, gain=VALUE_GAIN),
        gdn + "in_proj_ba.weight": draw.linear(2 * VALUE_HEADS, HIDDEN, gain=GATE_GAIN),
        gdn + "conv1d.weight": draw.normal(2 * keys + values, 1, KERNEL, std=0.7),
        gdn + "dt_bias": draw.normal(VALUE_HEADS, std=0.5),
        gdn + "A_log": draw.torch.tensor(DECAYS).log(),
        gdn + "norm.weight": draw.full(VALUE_DIM),
        gdn + "out_proj.weight": draw.linear(HIDDEN, values, gain=VALUE_GAIN),
    }


def gated_attention(draw: Draw, layer: str) -> State:
    """Return one layer of attention, whose query projection has the output's gates beside it."""
    attn = layer + "self_attn."
    size = GDN_HEAD_DIM
    return {
        attn + "q_proj.weight": draw.linear(2 * HEADS * size, HIDDEN),
        attn + "k_proj.weight": draw.linear(KV_HEADS * size, HIDDEN),
        attn + "v_proj.weight": draw.linear(KV_HEADS * size, HIDDEN, gain=VALUE_GAIN),
        attn + "o_proj.weight": draw.linear(HIDDEN, HEADS * size, gain=VALUE_GAIN),
        # These norms' weights are added to 1.
        attn + "q_norm.weight": draw.full(size, ATTENTION_GAIN - 1),
        attn + "k_norm.weight": draw.full(size, ATTENTION_GAIN - 1),
    }


def experts(draw: Draw, layer: str) -> State:
    """Return one layer's experts, the shared one, and what chooses among them."""
    mlp = layer + "mlp."
    state = {
        mlp + "gate.weight": draw.linear(EXPERTS, HIDDEN),
        mlp + "shared_expert_gate.weight": draw.linear(1, HIDDEN),
    }
    for name in ("shared_expert", *(f"experts.{i}" for i in range(EXPERTS))):
        state |= gated_mlp(draw, f"{mlp}{name}.", EXPERT_INTERMEDIATE)
    return state


def gated_mlp(draw: Draw, prefix: str, wide: int) -> dict[str, Any]:
    return {
        prefix + "gate_proj.weight": draw.linear(wide, HIDDEN),
        prefix + "up_proj.weight": draw.linear(wide, HIDDEN),
        prefix + "down_proj.weight": draw.linear(HIDDEN, wide),
    }


def offset_norms(draw: Draw, layer: str) -> State:
    """Return a layer's norms, whose weights are added to 1."""
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"{layer}{name}.weight": draw.full(HIDDEN, 0.0) for name in names}


def final_norm(draw: Draw) -> State:
    return {"model.norm.weight": draw.full(HIDDEN, 0.0)}

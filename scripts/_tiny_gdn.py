"""Tiny models with gated delta rule layers.

Their decay is slow in some heads and fast in others, so that what is said depends on tokens of
earlier chunks and blocks, and a lost state shows.
"""

from __future__ import annotations

from collections.abc import Callable

from _tiny_draw import Draw
from _tiny_parts import (
    ATTENTION_GAIN,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    VALUE_GAIN,
    Kind,
    State,
    common,
)

LAYER_TYPES = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
GDN_HEAD_DIM, PARTIAL = 128, 0.25
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 4, 64, 128, 4
EXPERTS, CHOSEN, EXPERT_INTERMEDIATE = 4, 2, 128
# A head's state halves in about 0.7 / A tokens.
DECAYS = (0.004, 0.03, 0.2, 1.5)
GATE_GAIN = 2.0


def qwen3_next_kind(*, key_dim: int = KEY_DIM, dense: bool = False) -> Kind:
    """Return Qwen3-Next: three GDN layers and one of attention, each with experts behind it.

    Args:
        key_dim: K; other than V where it can be, so that a transposed state shows.
        dense: One MLP in place of the experts.
    """

    def config(_vocab: dict[str, int]) -> State:
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            **hybrid(key_dim),
            "partial_rotary_factor": PARTIAL,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(len(LAYER_TYPES))) if dense else [],
            "moe_intermediate_size": EXPERT_INTERMEDIATE,
            "shared_expert_intermediate_size": EXPERT_INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "norm_topk_prob": True,
            "output_router_logits": False,
        }

    def weights(draw: Draw, layer: str) -> State:
        return {
            **(
                gated_attention(draw, layer)
                if is_attention(layer)
                else gated_delta_net(draw, layer, key_dim)
            ),
            **(gated_mlp(draw, layer + "mlp.", INTERMEDIATE) if dense else experts(draw, layer)),
            **offset_norms(draw, layer),
        }

    return Kind(config, weights, more=final_norm("model."), layers=len(LAYER_TYPES))


def qwen3_5_kind() -> Kind:
    """Return Qwen3.5 without its vision tower: qwen3_next_kind(dense=True) in another layout."""
    model = "model.language_model."

    def config(vocab: dict[str, int]) -> State:
        text = {
            **common(vocab, "auto"),
            "model_type": "qwen3_5_text",
            "num_hidden_layers": len(LAYER_TYPES),
            **hybrid(KEY_DIM),
            "attn_output_gate": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": PARTIAL,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        }
        for name in ("torch_dtype", "rope_scaling", "rope_theta"):
            del text[name]
        # Of pictures nothing is served; vLLM wants to know all the same.
        token = vocab["<|endoftext|>"]
        names = ("image", "video", "vision_start", "vision_end")
        return {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            **{f"{name}_token_id": token for name in names},
            "text_config": text,
            "vision_config": {
                "model_type": "qwen3_5",
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 1,
                "out_hidden_size": HIDDEN,
                "deepstack_visual_indexes": [],
            },
        }

    def weights(draw: Draw, layer: str) -> State:
        found = qwen3_next_kind(dense=True).weights(draw, layer)
        return found if is_attention(layer) else by_kind(draw, found, layer + "linear_attn.")

    return Kind(config, weights, more=final_norm(model), layers=len(LAYER_TYPES), prefix=model)


def by_kind(draw: Draw, state: State, gdn: str) -> State:
    """Return a GDN layer with its projections apart: Qwen3-Next's lie by key head in one."""
    group = VALUE_HEADS // KEY_HEADS
    sizes = [KEY_DIM, KEY_DIM, group * VALUE_DIM, group * VALUE_DIM]
    mixed = state.pop(gdn + "in_proj_qkvz.weight").unflatten(0, (KEY_HEADS, -1))
    *qkv, z = (part.flatten(0, 1) for part in mixed.split(sizes, 1))
    b, a = state.pop(gdn + "in_proj_ba.weight").unflatten(0, (KEY_HEADS, -1)).split(group, 1)
    return state | {
        gdn + "in_proj_qkv.weight": draw.torch.cat(qkv),
        gdn + "in_proj_z.weight": z,
        gdn + "in_proj_b.weight": b.flatten(0, 1),
        gdn + "in_proj_a.weight": a.flatten(0, 1),
    }


def is_attention(layer: str) -> bool:
    """Whether a layer, by the prefix of its weights, is one of attention."""
    return LAYER_TYPES[int(layer.split(".")[-2])] == "full_attention"


def hybrid(key_dim: int) -> State:
    """Return what a configuration says about its layers."""
    return {
        "head_dim": GDN_HEAD_DIM,
        "layer_types": list(LAYER_TYPES),
        "full_attention_interval": len(LAYER_TYPES),
        "linear_conv_kernel_dim": KERNEL,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": VALUE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
    }


def gated_delta_net(draw: Draw, layer: str, key_dim: int) -> State:
    """Return one GDN layer: projections by key head, q k v z and b a within each."""
    gdn = layer + "linear_attn."
    keys, values = KEY_HEADS * key_dim, VALUE_HEADS * VALUE_DIM
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


def gated_mlp(draw: Draw, prefix: str, wide: int) -> State:
    return {
        prefix + "gate_proj.weight": draw.linear(wide, HIDDEN),
        prefix + "up_proj.weight": draw.linear(wide, HIDDEN),
        prefix + "down_proj.weight": draw.linear(HIDDEN, wide),
    }


def offset_norms(draw: Draw, layer: str) -> State:
    """Return a layer's norms, whose weights are added to 1."""
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"{layer}{name}.weight": draw.full(HIDDEN, 0.0) for name in names}


def final_norm(prefix: str) -> Callable[[Draw], State]:
    """Return what draws the text model's last norm, whose weights are added to 1 as well."""
    return lambda draw: {f"{prefix}norm.weight": draw.full(HIDDEN, 0.0)}

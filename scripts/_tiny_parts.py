"""What tiny models are made of: sizes, and the parts that several kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _tiny_draw import Draw

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
MAX_POSITIONS = 4096
EMBED_STD = 0.3
ATTENTION_GAIN = 1.5  # standard deviation of a score before the softmax is about its square
VALUE_GAIN = 1.2
LOGIT_STD = 2.0

HEAD_DIM = 128

State = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One tiny model.

    Attributes:
        config: Of a vocabulary size, what config.json says besides what all of them have.
        weights: Draws one decoder layer's attention and norms, given the layer's prefix.
        more: Draws what the model has besides embeddings, decoder layers and head.
        images: Takes images: the tokenizer has their special tokens.
        layers: Decoder layers.
        prefix: Of the text model's weights.
    """

    config: Callable[[dict[str, int]], State]
    weights: Callable[[Draw, str], State]
    more: Callable[[Draw], State] = lambda draw: {}
    images: bool = False
    layers: int = LAYERS
    prefix: str = "model."


def common(vocab: dict[str, int], dtype: str) -> State:
    """Return what every config.json says."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocab["<|endoftext|>"],
        "eos_token_id": vocab["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        # Not 1e6: with prompts of tens of tokens most of the pairs should turn visibly.
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": len(vocab),
    }


def attention(draw: Draw, layer: str, head_dim: int, gain: float = 1.0) -> State:
    """Return the projections of one decoder layer's attention; `gain` on queries and keys."""
    attn = layer + "self_attn."
    return {
        attn + "q_proj.weight": draw.linear(HEADS * head_dim, HIDDEN, gain=gain),
        attn + "k_proj.weight": draw.linear(KV_HEADS * head_dim, HIDDEN, gain=gain),
        attn + "v_proj.weight": draw.linear(KV_HEADS * head_dim, HIDDEN, gain=VALUE_GAIN),
        attn + "o_proj.weight": draw.linear(HIDDEN, HEADS * head_dim, gain=VALUE_GAIN),
    }


def feed_forward(draw: Draw, layer: str) -> State:
    mlp = layer + "mlp."
    return {
        mlp + "gate_proj.weight": draw.linear(INTERMEDIATE, HIDDEN),
        mlp + "up_proj.weight": draw.linear(INTERMEDIATE, HIDDEN),
        mlp + "down_proj.weight": draw.linear(HIDDEN, INTERMEDIATE),
        layer + "input_layernorm.weight": draw.full(HIDDEN),
        layer + "post_attention_layernorm.weight": draw.full(HIDDEN),
    }

"""Tiny Qwen3 models whose number of KV heads decides how tensor-parallel ranks cut them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from _tiny_draw import Draw
from _tiny_weights import HEADS, HIDDEN, KINDS, VALUE_GAIN, Kind


def qwen3(kv_heads: int) -> Kind:
    """Return the tiny Qwen3 with 1, 2 or 4 KV heads.

    With 1, two ranks hold the same head: replication.
    """
    base = KINDS["qwen3"]
    assert HEADS % kv_heads == 0

    def config(vocab: dict[str, int]) -> dict[str, Any]:
        return {**base.config(vocab), "num_key_value_heads": kv_heads}

    def weights(draw: Draw, layer: str) -> dict[str, Any]:
        state = base.weights(draw, layer)
        head_dim = state[f"{layer}self_attn.q_norm.weight"].shape[0]
        for name, gain in (("k", 1.0), ("v", VALUE_GAIN)):
            drawn = draw.linear(kv_heads * head_dim, HIDDEN, gain=gain)
            state[f"{layer}self_attn.{name}_proj.weight"] = drawn
        return state

    return replace(base, config=config, weights=weights)

"""The model of scripts/bench kv ttft: python _ttft_model.py FOLDER, with an environment's torch.

As many KV heads as query heads, so that a token's KV is large beside what it costs to compute.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

LAYERS, HEADS, HEAD_SIZE, ITEMSIZE = 2, 32, 64, 4
DTYPE = "float32"
# vLLM 0.18.0's connector takes a CPU cache's heads for its tokens, and stops at the start unless
# there are as many: this is the block with which it runs unpatched.
BLOCK = HEADS
TOKEN_BYTES = 2 * LAYERS * HEADS * HEAD_SIZE * ITEMSIZE


def kv_bytes(tokens: int, block: int) -> int:
    """Bytes of the blocks that hold a prompt: whole ones are transferred."""
    return -(-tokens // block) * block * TOKEN_BYTES


def make(folder: Path) -> None:
    """Write the model."""
    from _tiny_model import make_tiny_model
    from _tiny_parts import ATTENTION_GAIN, HIDDEN, VALUE_GAIN
    from _tiny_weights import KINDS

    base = KINDS["qwen3"]
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE}

    def weights(draw: Any, layer: str) -> dict[str, Any]:
        wide = HEADS * HEAD_SIZE
        attn = f"{layer}self_attn."
        return base.weights(draw, layer) | {
            attn + "q_proj.weight": draw.linear(wide, HIDDEN),
            attn + "k_proj.weight": draw.linear(wide, HIDDEN),
            attn + "v_proj.weight": draw.linear(wide, HIDDEN, gain=VALUE_GAIN),
            attn + "o_proj.weight": draw.linear(HIDDEN, wide, gain=VALUE_GAIN),
            attn + "q_norm.weight": draw.full(HEAD_SIZE, ATTENTION_GAIN),
            attn + "k_norm.weight": draw.full(HEAD_SIZE, ATTENTION_GAIN),
        }

    kind = replace(base, config=lambda vocab: base.config(vocab) | sizes, weights=weights)
    make_tiny_model(folder, replace(kind, layers=LAYERS), dtype=DTYPE)


if __name__ == "__main__":
    make(Path(sys.argv[1]))

"""The model that scripts/bench engine serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 8192


def write_model(folder: Path, *, hidden: int, layers: int) -> None:
    """Qwen3 with heads of 128, two to a group, at random weights that keep activations alive."""
    import torch
    from safetensors.torch import save_file

    heads, wide = hidden // 128, 3 * hidden
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = {"model.embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
    shapes["model.norm"] = (hidden,)
    for layer in range(layers):
        inside = {
            "self_attn.q_proj": (heads * 128, hidden),
            "self_attn.k_proj": (heads * 64, hidden),
            "self_attn.v_proj": (heads * 64, hidden),
            "self_attn.o_proj": (hidden, heads * 128),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) == 1:
            # Larger than one where q and k are normalised: attention then looks at single tokens.
            return torch.full(shape, 1.6 if "_norm" in name and "attn" in name else 1.0)
        spread = 1.0 if "embed" in name else shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * spread

    state = {f"{n}.weight": draw(n, shape).to(torch.bfloat16) for n, shape in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))

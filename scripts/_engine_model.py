"""The models that scripts/bench engine serves, at random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 8192
# name: prompts, tokens of each, new tokens of each
WORKLOADS = {"prefill": (32, 1000, 1), "decode": (32, 64, 128)}
KEY_HEADS, VALUE_HEADS, SIZE, KERNEL, EVERY = 16, 32, 128, 4, 4


def produced(name: str) -> int:
    """Tokens that count in a workload: the new ones, or a prefill's prompts."""
    prompts, length, new = WORKLOADS[name]
    return prompts * (new if new > 1 else length)


@dataclass(frozen=True)
class Model:
    """One of them.

    Attributes:
        write: Writes it to a folder, given its hidden size and its number of layers.
        control: What `spoil` does.
        spoil: Makes a loaded model answer something else, as a patch's fault would.
        file: Where results go.
        settings: What vLLM is told besides.
        answers: The dtype in which answers are compared: float32, in which greedy tokens must be
            equal, where the kernels take it.
    """

    write: Callable[..., None]
    control: str
    spoil: Callable[[Any], None]
    file: str
    settings: dict[str, Any] = field(default_factory=dict)
    answers: str = "float32"


def write_qwen3(folder: Path, *, hidden: int, layers: int) -> None:
    """Qwen3 with heads of 128, two to a group, at random weights that keep activations alive."""
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
    save(folder, config, shapes)


def write_gdn(folder: Path, *, hidden: int, layers: int) -> None:
    """Dense Qwen3.5 without its vision tower: Qwen3-Next's heads, attention in every fourth."""
    heads, wide = hidden // 256, 3 * hidden
    kinds = [
        "full_attention" if (n + 1) % EVERY == 0 else "linear_attention" for n in range(layers)
    ]
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "layer_types": kinds,
        "full_attention_interval": EVERY,
        "linear_conv_kernel_dim": KERNEL,
        "linear_key_head_dim": SIZE,
        "linear_value_head_dim": SIZE,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "attn_output_gate": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }
    tower = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1}
    tokens = ("image", "video", "vision_start", "vision_end")
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": {"model_type": "qwen3_5", **tower, "out_hidden_size": hidden},
        **{f"{name}_token_id": 0 for name in tokens},
    }
    model = "model.language_model."
    shapes = {f"{model}embed_tokens": (VOCABULARY, hidden), "lm_head": (VOCABULARY, hidden)}
    shapes[f"{model}norm"] = (hidden,)
    keys, values = KEY_HEADS * SIZE, VALUE_HEADS * SIZE
    for layer, kind in enumerate(kinds):
        inside = {
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        if kind == "full_attention":
            inside |= {
                "self_attn.q_proj": (2 * heads * 256, hidden),
                "self_attn.k_proj": (2 * 256, hidden),
                "self_attn.v_proj": (2 * 256, hidden),
                "self_attn.o_proj": (hidden, heads * 256),
                "self_attn.q_norm": (256,),
                "self_attn.k_norm": (256,),
            }
        else:
            inside |= {
                "linear_attn.in_proj_qkv": (2 * keys + values, hidden),
                "linear_attn.in_proj_z": (values, hidden),
                "linear_attn.in_proj_b": (VALUE_HEADS, hidden),
                "linear_attn.in_proj_a": (VALUE_HEADS, hidden),
                "linear_attn.conv1d": (2 * keys + values, 1, KERNEL),
                "linear_attn.dt_bias": (VALUE_HEADS,),
                "linear_attn.A_log": (VALUE_HEADS,),
                "linear_attn.norm": (SIZE,),
                "linear_attn.out_proj": (hidden, values),
            }
        shapes |= {f"{model}layers.{layer}.{name}": shape for name, shape in inside.items()}
    save(folder, config, shapes)


def save(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Draw the weights and write the model's two files."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    offset = config["model_type"] == "qwen3_5"

    def draw(name: str, shape: tuple[int, ...]) -> Any:
        if name.endswith("A_log"):
            # Heads that forget within tokens, and heads that keep a whole prompt.
            return torch.linspace(-6.0, 0.5, *shape)
        if name.endswith("dt_bias"):
            return torch.randn(shape, generator=generator) * 0.5
        if len(shape) == 1:
            # Larger than one where q and k are normalised: attention then looks at single tokens.
            size = 1.6 if "_norm" in name and "attn" in name else 1.0
            # Qwen3.5 adds its norms' weights to 1, but for the gated one's.
            return torch.full(shape, size - (offset and "linear_attn" not in name))
        spread = 1.0 if "embed" in name else shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * spread

    bare = ("A_log", "dt_bias")
    state = {
        n if n.endswith(bare) else f"{n}.weight": draw(n, shape).to(torch.bfloat16)
        for n, shape in shapes.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def negate_sines(model: Any) -> None:
    for name, cache in model.named_buffers():
        if name.endswith("cos_sin_cache"):
            cache[:, cache.shape[-1] // 2 :].neg_()


def double_decays(model: Any) -> None:
    for name, decay in model.named_parameters():
        if name.endswith("A_log"):
            decay.data += 0.7


MODELS = {
    "qwen3": Model(write_qwen3, "sine negated", negate_sines, "engine.csv"),
    "gdn": Model(
        write_gdn,
        "decays doubled",
        double_decays,
        "engine_gdn.csv",
        {
            "additional_config": {"gdn_prefill_backend": "triton"},
            "limit_mm_per_prompt": {"image": 0, "video": 0},
        },
        answers="bfloat16",
    ),
}

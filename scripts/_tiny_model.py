"""Make a tiny random-weight Qwen3: config, safetensors and tokenizer, with nothing downloaded.

    python _tiny_model.py OUT [--dtype float32] [--head-dim 128] [--rope-scaling yarn] [--seed 0]

Random weights are easily useless for a test. With the customary small scales a token's own
embedding dominates the residual stream, the output is one token for ever, and a wrong RoPE hardly
shows. The scales here are chosen against that:

- embeddings are small beside what attention and the MLP add, and the head is not tied to them, so
  a token does not predict itself;
- the key/query norms have gain, so attention is sharp and follows the rotation;
- all tokens but whole words have a zero head row: they are never the greedy choice, so answers
  are readable and never end early.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_WORDS = (
    "the of and to in is it that was for on are with as be at one have this from by had not but "
    "what all were when we there can an your which their said if do will each about how up out "
    "them then she many some so these would other into has more her two like him see time could "
    "no make than first been its who now people my made over did down only way find use may "
    "water long little very after words called just where most know get through back much before "
    "go good new write our used me man too any day same right look think also around another"
)
WORDS = _WORDS.split()

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
MAX_POSITIONS = 4096
EMBED_STD = 0.3
ATTENTION_GAIN = 1.5  # standard deviation of a score before the softmax is about its square
VALUE_GAIN = 1.2
LOGIT_STD = 2.0


def byte_symbols() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = (chr(256 + n) for n in range(256))
    return {b: chr(b) if b in plain else next(spare) for b in range(256)}


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id, merges): bytes, then each word of `WORDS` built from left to right.

    The list is fixed rather than trained, so every machine makes the same tokenizer.
    """
    symbols = byte_symbols()
    tokens = [*SPECIAL, *symbols.values()]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        piece = symbols[ord(" ")]
        for letter in word:
            if piece + letter not in tokens:
                tokens.append(piece + letter)
                merges.append((piece, letter))
            piece += letter
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write the tokenizer's files to `folder` and return token -> id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return vocab


def silent_tokens(vocab: dict[str, int]) -> list[int]:
    """Return the ids that must never be the greedy choice: all but the words and `.,`."""
    spoken = {byte_symbols()[ord(" ")] + word for word in WORDS} | {".", ","}
    return [i for token, i in vocab.items() if token not in spoken]


def config(
    vocab: dict[str, int], *, dtype: str, head_dim: int, rope_scaling: str | None
) -> dict[str, Any]:
    """Return config.json's content."""
    scaling = None
    if rope_scaling == "yarn":
        # The original window is shorter than the tests' longer prompts, so that scaling matters.
        scaling = {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": vocab[SPECIAL[0]],
        "eos_token_id": vocab[SPECIAL[2]],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": scaling,
        # Not 1e6: with prompts of tens of tokens most of the pairs should turn visibly.
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(vocab),
    }


def weights(cfg: dict[str, Any], silent: list[int], *, dtype: str, seed: int) -> dict[str, Any]:
    """Return the state dictionary; the same seed gives the same values in every dtype."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    head_dim, vocab_size = cfg["head_dim"], cfg["vocab_size"]

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    def linear(out_features: int, in_features: int, gain: float = 1.0) -> torch.Tensor:
        return normal(out_features, in_features, std=gain / math.sqrt(in_features))

    embed = normal(vocab_size, HIDDEN, std=EMBED_STD)
    head = linear(vocab_size, HIDDEN, gain=LOGIT_STD)
    head[silent] = 0
    state = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head,
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        attn, mlp = layer + "self_attn.", layer + "mlp."
        state |= {
            layer + "input_layernorm.weight": torch.ones(HIDDEN),
            layer + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            attn + "q_proj.weight": linear(HEADS * head_dim, HIDDEN),
            attn + "k_proj.weight": linear(KV_HEADS * head_dim, HIDDEN),
            attn + "v_proj.weight": linear(KV_HEADS * head_dim, HIDDEN, gain=VALUE_GAIN),
            attn + "o_proj.weight": linear(HIDDEN, HEADS * head_dim, gain=VALUE_GAIN),
            attn + "q_norm.weight": torch.full((head_dim,), ATTENTION_GAIN),
            attn + "k_norm.weight": torch.full((head_dim,), ATTENTION_GAIN),
            mlp + "gate_proj.weight": linear(INTERMEDIATE, HIDDEN),
            mlp + "up_proj.weight": linear(INTERMEDIATE, HIDDEN),
            mlp + "down_proj.weight": linear(HIDDEN, INTERMEDIATE),
        }
    # Rounding to bfloat16 first gives both dtypes the same model, so the two can be compared.
    return {
        name: value.to(torch.bfloat16).to(getattr(torch, dtype)).contiguous()
        for name, value in state.items()
    }


def make_tiny_model(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    head_dim: int = 128,
    rope_scaling: str | None = None,
    seed: int = 0,
) -> Path:
    """Write the model to `folder` and return it. Needs torch, safetensors and tokenizers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    cfg = config(vocab, dtype=dtype, head_dim=head_dim, rope_scaling=rope_scaling)
    state = weights(cfg, silent_tokens(vocab), dtype=dtype, seed=seed)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    ids = {"bos_token_id": cfg["bos_token_id"], "eos_token_id": cfg["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    # Last: a folder with a config is a complete model.
    (folder / "config.json").write_text(json.dumps(cfg, indent=1))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rope-scaling", choices=["yarn"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_tiny_model(
        args.out,
        dtype=args.dtype,
        head_dim=args.head_dim,
        rope_scaling=args.rope_scaling,
        seed=args.seed,
    )
    print(args.out)


if __name__ == "__main__":
    main()

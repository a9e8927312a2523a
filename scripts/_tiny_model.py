"""Make a tiny random-weight model: config, safetensors and tokenizer, with nothing downloaded.

    python _tiny_model.py OUT [--kind qwen3] [--dtype float32] [--seed 0]

What the kinds are, and how their weights are chosen: _tiny_weights.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _tiny_parts import MAX_POSITIONS, Kind, common
from _tiny_weights import KINDS, MERGE, PATCH, TEMPORAL, draw_state

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_SPECIAL = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = (
    "the of and to in is it that was for on are with as be at one have this from by had not but "
    "what all were when we there can an your which their said if do will each about how up out "
    "them then she many some so these would other into has more her two like him see time could "
    "no make than first been its who now people my made over did down only way find use may "
    "water long little very after words called just where most know get through back much before "
    "go good new write our used me man too any day same right look think also around another"
)
WORDS = _WORDS.split()

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# Nothing behind the text: an answer goes on where the text ends, and so does the next question.
PLAIN_CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_symbols() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = (chr(256 + n) for n in range(256))
    return {b: chr(b) if b in plain else next(spare) for b in range(256)}


def vocabulary(images: bool = False) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token -> id, merges): bytes, then each word of `WORDS` built from left to right.

    The list is fixed rather than trained, so every machine makes the same tokenizer.

    Args:
        images: Add the special tokens of images, behind the others.
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
    if images:
        tokens += IMAGE_SPECIAL
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, images: bool = False) -> dict[str, int]:
    """Write the tokenizer's files to `folder` and return token -> id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = vocabulary(images)
    special = (*SPECIAL, *IMAGE_SPECIAL) if images else SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer" if images else "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": PLAIN_CHAT if images else CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return vocab


def silent_tokens(vocab: dict[str, int]) -> list[int]:
    """Return the ids that must never be the greedy choice: all but the words and `.,`."""
    spoken = {byte_symbols()[ord(" ")] + word for word in WORDS} | {".", ","}
    return [i for token, i in vocab.items() if token not in spoken]


def write_image_processor(folder: Path) -> None:
    """Write how images become patches; few pixels, so that an image is some tens of tokens."""
    settings = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": (2 * MERGE * PATCH) ** 2,
        "max_pixels": (8 * MERGE * PATCH) ** 2,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))


def make_tiny_model(
    folder: Path, kind: str | Kind = "qwen3", *, dtype: str = "bfloat16", seed: int = 0
) -> Path:
    """Write the model to `folder` and return it. Needs torch, safetensors and tokenizers.

    Args:
        kind: One of `KINDS`, or its name.
        dtype: Of the weights; the same seed gives the same values in every dtype.
    """
    import torch
    from safetensors.torch import save_file

    kind = KINDS[kind] if isinstance(kind, str) else kind
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder, kind.images)
    if kind.images:
        write_image_processor(folder)
    cfg = common(vocab, dtype) | {"num_hidden_layers": kind.layers} | kind.config(vocab)
    state = {
        # Rounding to bfloat16 first gives all dtypes the same model, so they can be compared.
        name: value.to(torch.bfloat16).to(getattr(torch, dtype)).contiguous()
        for name, value in draw_state(kind, len(vocab), silent_tokens(vocab), seed).items()
    }
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    ids = {"bos_token_id": cfg["bos_token_id"], "eos_token_id": cfg["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    # Last: a folder with a config is a complete model.
    (folder / "config.json").write_text(json.dumps(cfg, indent=1))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--kind", default="qwen3", choices=list(KINDS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_tiny_model(args.out, args.kind, dtype=args.dtype, seed=args.seed)
    print(args.out)


if __name__ == "__main__":
    main()

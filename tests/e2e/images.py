"""Questions about images, asked as logprobs.py asks about text.

The images are made here: coloured blocks, no two alike. The tiny model's chat template adds nothing
behind the text, so the words that another server has said go on in the question.
"""

from __future__ import annotations

import base64
import random
import struct
import zlib
from dataclasses import dataclass

import logprobs
from _server import Server
from _tiny_model import byte_symbols, vocabulary
from logprobs import STEPS, TOP, Answer

BLOCK = 14  # pixels; one patch of the vision tower


@dataclass(frozen=True)
class Question:
    """Images, each by its size in blocks (width, height), and a text behind them."""

    text: str
    sizes: tuple[tuple[int, int], ...]


# Square, wide and tall; several windows of the tower's attention; two images in one prompt.
QUESTIONS = {
    "square": Question("What do you see", ((6, 6),)),
    "wide": Question("The people look at", ((16, 4),)),
    "tall": Question("Which way would you go", ((4, 12),)),
    "large": Question("no", ((12, 10),)),
    "two": Question("How do these two look", ((6, 4), (4, 8))),
}


def ask(server: Server, lead: tuple[Answer, ...] | None = None) -> tuple[Answer, ...]:
    """Return an answer to each of `QUESTIONS`, following another server's tokens if any."""
    if lead is None:
        return tuple(_generate(server, name, (), STEPS) for name in QUESTIONS)

    def go_on(answer: Answer, said: tuple[int, ...], count: int) -> Answer:
        assert isinstance(answer.prompt, str)
        return _generate(server, answer.prompt, said, count)

    return tuple(logprobs.follow(answer, go_on) for answer in lead)


def png(width: int, height: int, seed: int) -> bytes:
    """Return an image of coloured blocks as a PNG file.

    Args:
        width, height: In blocks.
        seed: Of the colours.
    """
    colours = random.Random(seed)
    rows = []
    for _ in range(height):
        row = b"".join(colours.randbytes(3) * BLOCK for _ in range(width))
        # Each line begins with its filter: none.
        rows += [b"\0" + row] * BLOCK
    size = struct.pack(">II5B", width * BLOCK, height * BLOCK, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", size), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _generate(server: Server, name: str, said: tuple[int, ...], count: int) -> Answer:
    question = QUESTIONS[name]
    content: list[dict] = []
    for seed, (width, height) in enumerate(question.sizes):
        data = base64.b64encode(png(width, height, seed)).decode()
        url = {"url": f"data:image/png;base64,{data}"}
        content.append({"type": "image_url", "image_url": url})
    content.append({"type": "text", "text": question.text + _text(said)})
    answer = server.post(
        "/v1/chat/completions",
        {
            "model": "model",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": count,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": TOP,
            "return_tokens_as_token_ids": True,
        },
    )
    found = answer["choices"][0]["logprobs"]["content"]
    steps = tuple({top["token"]: top["logprob"] for top in step["top_logprobs"]} for step in found)
    return Answer(name, tuple(logprobs.token_id(step["token"]) for step in found), steps)


def _text(tokens: tuple[int, ...]) -> str:
    """Return the text of tokens; the model only says whole words and `.,`, so it is exact."""
    names = {number: name for name, number in vocabulary(images=True)[0].items()}
    space = byte_symbols()[ord(" ")]
    return "".join(names[token] for token in tokens).replace(space, " ")

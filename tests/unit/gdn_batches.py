"""Batches of GDN requests, of every kind that vLLM's scheduler makes."""

from __future__ import annotations

import dataclasses
import random

# What a request that speculates may draft.
DRAFTS = 3


@dataclasses.dataclass
class Case:
    """One batch: for each request its tokens, its context, and its drafts (-1: it has none).

    Attributes:
        padding: Requests without tokens behind it.
        tokens: What the runner pads the tokens to; 0 for as many as there are.
    """

    name: str
    tokens_of: list[int]
    context: list[int]
    drafts: list[int] | None = None
    padding: int = 0
    tokens: int = 0
    graphs: bool = False
    mode: str = "none"


def fixed(version: tuple[int, ...]) -> list[Case]:
    """Those with a name, for a release."""
    cases = [
        Case("prefill", [4, 8], [0, 0]),
        Case("prefill of what is cached in part", [65, 1, 64], [128, 64, 0]),
        Case("decode and prefill", [1, 1, 70], [9, 30, 0]),
        Case("last chunk of one token", [1, 1, 500], [12, 448, 64]),
        Case("decode", [1, 1, 1], [5, 6, 7]),
        Case("a prompt of one token", [1, 1, 1], [5, 0, 7]),
        Case("prompts of one token and decode, captured", [1] * 4, [0, 9, 0, 3], graphs=True),
        Case("a prompt of one token before another", [1, 1, 9], [4, 0, 0]),
        Case("a prompt of one token beside drafts", [1, 4], [0, 9], [-1, 3]),
        Case("decode, captured", [1, 1, 1], [5, 6, 7], graphs=True, padding=1, tokens=4),
        Case("empty in the middle", [4, 0, 9], [0, 3, 0]),
        Case("prefill, padded", [1, 5], [3, 0], padding=2),
        Case("no drafts after all", [1, 1, 6], [4, 4, 0], [0, 0, -1]),
        Case("drafts alone", [4, 4], [9, 20], [3, 3]),
        Case("drafts alone, fewer", [2, 4, 1], [9, 20, 7], [1, 3, 0]),
        Case("drafts alone, captured", [4, 4], [9, 20], [3, 3], graphs=True, tokens=12),
        Case("mixed, with padding", [4, 4, 8], [0, 9, 0], [-1, 3, -1], padding=1),
        Case("mixed, last chunk of one token", [1, 4, 7], [30, 9, 0], [-1, 3, -1]),
        Case("mixed, captured", [3, 4, 66], [0, 9, 4], [-1, 3, -1], graphs=True),
        Case("drafts and decode", [1, 4], [8, 9], [-1, 3]),
    ]
    if version >= (0, 17):
        # Up to 0.16 they count as prefills, and the release then asks for their chunks.
        graphs = {"graphs": True, "padding": 2, "tokens": 16}
        cases.append(Case("drafts alone, padded", [4, 4], [9, 20], [3, 3], padding=2))
        cases.append(Case("drafts alone, padded and captured", [4, 4], [9, 20], [3, 3], **graphs))
    if version >= (0, 15):
        cases += [
            dataclasses.replace(case, name=f"{case.name}, align", mode="align") for case in cases
        ]
    return cases


def drawn(rng: random.Random, number: int, version: tuple[int, ...]) -> Case:
    """Any batch that a scheduler may make; decodes come first where nobody speculates."""
    count = rng.randint(1, 12)
    speculates = rng.random() < 0.6
    kinds = [rng.choice("pppsd" if speculates else "pppd") for _ in range(count)]
    if not speculates:
        kinds.sort()
    tokens = {
        "p": lambda: rng.choice([1, 2, 63, 64, 65, 200]) if speculates else rng.randint(2, 200),
        "s": lambda: rng.randint(1, DRAFTS + 1),
        "d": lambda: 1,
    }
    lengths = [tokens[kind]() for kind in kinds]
    drafts = [n - 1 if kind == "s" else -1 for n, kind in zip(lengths, kinds, strict=True)]
    context = [0 if kind == "p" and rng.random() < 0.5 else rng.randint(1, 99) for kind in kinds]
    return Case(
        f"drawn {number}: {''.join(kinds)}",
        lengths,
        context,
        drafts if speculates else None,
        padding=rng.choice([0, 0, 1, 3]) if version >= (0, 17) else 0,
        graphs=rng.random() < 0.5,
        mode=rng.choice(["none", "align"]) if version >= (0, 15) else "none",
    )

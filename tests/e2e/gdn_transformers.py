"""What transformers says to the same prompts: float32, the whole text at once, no cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import logprobs


@dataclass(frozen=True)
class Verdict:
    """How answers compare with the oracle's.

    Attributes:
        wrong: Steps whose token is not the oracle's greedy choice; those behind one follow it.
        apart: For each answer the largest difference of a token's logprob.
        margin: The smallest distance between the oracle's first and second choice at a step.
    """

    wrong: int
    apart: tuple[float, ...]
    margin: float

    @property
    def worst(self) -> float:
        return max(self.apart)


class Oracle:
    """A model of transformers, in one dtype."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()

    def logprobs(self, tokens: Sequence[int]) -> Any:
        """Return [T, vocabulary], of what follows each token."""
        with self.torch.no_grad():
            found = self.network(self.torch.tensor([tokens]), use_cache=False).logits[0]
        return found.float().log_softmax(-1)

    def judge(self, answers: Iterable[logprobs.Answer]) -> Verdict:
        """Compare each step with what the oracle says to the text before it."""
        wrong, apart, margin = 0, [], math.inf
        for answer in answers:
            text = [*answer.prompt, *answer.tokens]
            right = self.logprobs(text)[len(answer.prompt) - 1 : -1]
            first, second = right.topk(2).values.unbind(-1)
            margin = min(margin, float((first - second).min()))
            wrong += sum(
                a != b for a, b in zip(right.argmax(-1).tolist(), answer.tokens, strict=True)
            )
            rows = zip(right, answer.steps, strict=True)
            apart.append(
                max(
                    abs(float(row[logprobs.token_id(token)]) - value)
                    for row, step in rows
                    for token, value in step.items()
                )
            )
        return Verdict(wrong, tuple(apart), margin)

    def read(self, prompt: Sequence[int]) -> list[float]:
        """Return the logprob of each token of a prompt but the first."""
        right = self.logprobs(prompt)[:-1]
        return right.gather(1, self.torch.tensor(prompt[1:])[:, None])[:, 0].tolist()


def distance(first: Iterable[Sequence[float]], second: Iterable[Sequence[float]]) -> float:
    """Return the root mean square of what lies between two readings."""
    squares = [
        (a - b) ** 2
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return math.sqrt(sum(squares) / len(squares))

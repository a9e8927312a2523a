"""Asks servers for the same greedy tokens with their logprobs, and compares two servers.

Greedy servers with different rounding may pick different tokens where two are nearly level, and
what follows then has nothing in common. So the second server is made to follow the first: where it
leaves the first one's tokens, it is asked again from the first one's. Each of the 16 steps
of each prompt is compared, whatever the greedy choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from _server import Server
from _tiny_model import WORDS

STEPS = 16
# Of a wrong model: each of its steps is another request, since it hardly ever says the same.
FAULTY_STEPS = 6
TOP = 20  # vLLM's own limit
# From a word to a page of text; among them repetition and text far from the tokenizer's words.
PROMPTS = (
    "water",
    "The people know how to make",
    "What is the time now, and who said so?",
    "one two three four five six seven",
    "def square(x):\n    return x * x\n",
    "In the beginning there was little but water, and then",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "12345 67890 24680 13579",
    "Say it again. " * 12,
    "She said that we can make more of it. " * 6,
    "no way",
    "Which way would you go, if you could go back and look at it once more? " * 4,
)

# More tokens than the window that YaRN stretches; words in an order that does not repeat soon.
LONG_PROMPTS = tuple(
    " ".join(WORDS[(i * i + step * i) % len(WORDS)] for i in range(count))
    for step, count in ((3, 1300), (7, 1100))
)

Step = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """One prompt's tokens and, for each step, token -> value of the most likely ones.

    Attributes:
        prompt: Its tokens, or the name of a question about an image.
    """

    prompt: tuple[int, ...] | str
    tokens: tuple[int, ...]
    steps: tuple[Step, ...]

    def head(self, steps: int) -> Answer:
        """Return the first steps alone."""
        return Answer(self.prompt, self.tokens[:steps], self.steps[:steps])


@dataclass(frozen=True)
class Difference:
    """How far two servers are apart.

    Attributes:
        worst: The largest difference of a token's value, over all prompts and steps.
        prompts: The same for each prompt.
        diverged: At how many steps the greedy choice was another.
        unlike: At how many steps the two lists of likely tokens share fewer than half.
    """

    worst: float
    prompts: tuple[float, ...]
    diverged: int
    unlike: int


def ask(
    server: Server, lead: tuple[Answer, ...] | None = None, prompts: tuple[str, ...] = PROMPTS
) -> tuple[Answer, ...]:
    """Return an answer to each prompt, following another server's tokens if there are any."""
    if lead is None:
        return tuple(generate(server, _tokenize(server, text), STEPS) for text in prompts)

    def go_on(answer: Answer, said: tuple[int, ...], count: int) -> Answer:
        return generate(server, (*answer.prompt, *said), count)

    return tuple(follow(answer, go_on) for answer in lead)


def ask_together(
    server: Server, prompts: tuple[Answer, ...], steps: int = STEPS
) -> tuple[Answer, ...]:
    """Return an answer to each prompt of `prompts`, all of them asked in one batch."""
    inputs = [list(answer.prompt) for answer in prompts]
    choices = _complete(server, inputs, steps)["choices"]
    choices.sort(key=lambda choice: choice["index"])
    return tuple(_answer(p.prompt, c) for p, c in zip(prompts, choices, strict=True))


def follow(lead: Answer, go_on: Callable[[Answer, tuple[int, ...], int], Answer]) -> Answer:
    """Return what another server says at each step of `lead`.

    Args:
        go_on: Asks for so many tokens behind the prompt of an answer and tokens already said.
    """
    steps: list[Step] = []
    tokens: list[int] = []
    while len(steps) < len(lead.tokens):
        done = len(steps)
        found = go_on(lead, lead.tokens[:done], len(lead.tokens) - done)
        for token, step in zip(found.tokens, found.steps, strict=True):
            steps.append(step)
            tokens.append(token)
            # What it said at this step counts; what it goes on to say is about another text.
            if token != lead.tokens[len(steps) - 1]:
                break
    return Answer(lead.prompt, tuple(tokens), tuple(steps))


def compare(first: tuple[Answer, ...], second: tuple[Answer, ...]) -> Difference:
    """Compare what two servers said at the same steps."""
    prompts, diverged, unlike = [], 0, 0
    for one, other in zip(first, second, strict=True):
        assert one.prompt == other.prompt
        worst = 0.0
        for a, b in zip(one.steps, other.steps, strict=True):
            shared = a.keys() & b.keys()
            unlike += len(shared) < TOP // 2
            diverged += max(a, key=a.__getitem__) != max(b, key=b.__getitem__)
            # Nothing in common is as far apart as it gets.
            worst = max(worst, *(abs(a[t] - b[t]) for t in shared)) if shared else math.inf
        prompts.append(worst)
    return Difference(max(prompts), tuple(prompts), diverged, unlike)


def root_mean_square(first: tuple[Answer, ...], second: tuple[Answer, ...]) -> float:
    """Return how far the values of the tokens that both name are apart, over all steps."""
    squares = [
        (a[token] - b[token]) ** 2
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one.steps, other.steps, strict=True)
        for token in a.keys() & b.keys()
    ]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.inf


def until_parted(
    first: tuple[Answer, ...], second: tuple[Answer, ...]
) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """Cut both behind the step at which their tokens part: then they talk about other texts.

    For answers that did not follow each other. Two tokens may be level to the last bit.
    """
    counts = [
        next((i + 1 for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        for one, other in zip(first, second, strict=True)
        for pairs in [list(zip(one.tokens, other.tokens, strict=True))]
    ]
    return (
        tuple(answer.head(count) for answer, count in zip(first, counts, strict=True)),
        tuple(answer.head(count) for answer, count in zip(second, counts, strict=True)),
    )


def heads(answers: tuple[Answer, ...], steps: int = FAULTY_STEPS) -> tuple[Answer, ...]:
    """Return the first steps of each answer."""
    return tuple(answer.head(steps) for answer in answers)


def largest(answers: tuple[Answer, ...]) -> float:
    """Return the largest magnitude among the values."""
    return max(abs(v) for answer in answers for step in answer.steps for v in step.values())


def bfloat16_ulp(value: float) -> float:
    """Return the distance between neighbouring bfloat16 numbers at `value`: 8 significant bits."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7)


def fewest_distinct(answers: tuple[Answer, ...]) -> int:
    """Return how many different tokens the most monotonous answer has."""
    return min(len(set(answer.tokens)) for answer in answers)


def generate(server: Server, prompt: tuple[int, ...], count: int) -> Answer:
    """Return the answer to a prompt of tokens."""
    return _answer(prompt, _complete(server, list(prompt), count)["choices"][0])


def _complete(server: Server, prompt: list[int] | list[list[int]], count: int) -> dict:
    return server.complete(
        prompt,
        max_tokens=count,
        ignore_eos=True,
        logprobs=TOP,
        return_tokens_as_token_ids=True,
    )


def _answer(prompt: tuple[int, ...] | str, choice: dict) -> Answer:
    said = choice["logprobs"]
    tokens = tuple(token_id(token) for token in said["tokens"])
    return Answer(prompt, tokens, tuple(said["top_logprobs"]))


def token_id(said: str) -> int:
    """Return the token that vLLM names when it is asked for ids in place of text."""
    return int(said.removeprefix("token_id:"))


def _tokenize(server: Server, text: str) -> tuple[int, ...]:
    return tuple(server.post("/tokenize", {"model": "model", "prompt": text})["tokens"])

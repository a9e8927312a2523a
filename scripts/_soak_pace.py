"""What a token takes a server with the shim and one without, by turns."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median, quantiles

from _server import Server

TOKENS = 64
# A machine that is slow has fewer rounds; of too few, quartiles say nothing.
FEWEST, SECONDS = 4, 90.0
PROMPT = "The people know how to make"


@dataclass(frozen=True)
class Pace:
    """Microseconds a token, of one request at a time.

    Attributes:
        patched, unpatched: Medians over the rounds.
        added: The median of the rounds' differences.
        quartiles: Of these differences, the first and the third.
    """

    rounds: int
    patched: float
    unpatched: float
    added: float
    quartiles: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.added:+.0f} us a token (half of the rounds between {low:+.0f} and {high:+.0f}):"
            f" {self.patched:.0f} us with the shim, {self.unpatched:.0f} us without, median of "
            f"{self.rounds} rounds by turns of {TOKENS} tokens"
        )


def measure(patched: Server, unpatched: Server, rounds: int, seconds: float = SECONDS) -> Pace:
    """Return the pace of two servers that share a machine, with nothing else asked of them.

    Args:
        rounds: How many, or as many as end in `seconds`, and `FEWEST` at least.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    ends = time.monotonic() + seconds
    for turn in range(-1, rounds):
        if turn >= FEWEST and time.monotonic() > ends:
            break
        # Who is first changes, so that what drifts is not always the second one's.
        for which in (turn % 2 == 0, turn % 2 != 0):
            seconds = one_answer(patched if which else unpatched)
            if turn >= 0:  # The first round warms both.
                times[which].append(seconds / TOKENS * 1e6)
    return pace_of(times[True], times[False])


def one_answer(server: Server) -> float:
    """Return the seconds that an answer of `TOKENS` takes."""
    began = time.perf_counter()
    server.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    return time.perf_counter() - began


def pace_of(patched: list[float], unpatched: list[float]) -> Pace:
    """Return the figures of rounds that were measured, microseconds a token."""
    added = [one - other for one, other in zip(patched, unpatched, strict=True)]
    low, _, high = quantiles(added, n=4)
    return Pace(len(added), median(patched), median(unpatched), median(added), (low, high))

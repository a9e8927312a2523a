"""What is asked of the two processes of `kv_process_ranks`, and what came of it."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import kv_ranks
from kv_process_ranks import Process, until

# Around a block of 128 tokens, and several of them.
LENGTHS = (1, 127, 128, 129, 500)
SECONDS = 60


class Pair:
    """Two processes that serve one ratio after the other."""

    def __init__(self) -> None:
        self.prefill, self.decode = Process("prefill"), Process("decode")

    def start(self, **setup: Any) -> None:
        addresses = self.prefill.ask("start", setup)
        self.decode.ask("start", setup)
        self.decode.ask("find", addresses)

    def stop(self) -> None:
        self.prefill.ask("stop")
        self.decode.ask("stop")

    def ended(self, number: int, seconds: float = SECONDS) -> None:
        until(lambda: self.decode.ask("is_pulled", number), seconds)
        until(lambda: self.prefill.ask("is_freed", number), seconds)


def needs(length: int) -> int:
    return -(-length // kv_ranks.TOKENS)


def ratios(setups: list[dict[str, Any]], together: int) -> list[dict[str, Any]]:
    """Prompts of all lengths one by one, some at once, and one with its heads swapped."""
    pair, found = Pair(), []
    for setup in setups:
        pair.start(**setup)
        began, one = time.monotonic(), {"right": [], "untouched": []}
        for number, length in enumerate(LENGTHS):
            blocks = [random.sample(range(kv_ranks.BLOCKS), needs(length)) for _ in range(2)]
            pair.prefill.ask("prefilled", number, blocks[0])
            pair.decode.ask("pull", number, blocks[1])
            pair.ended(number)
            one["right"].append(pair.decode.ask("right", number, blocks[1]))
            one["untouched"].append(pair.decode.ask("untouched", blocks[1]))
            pair.decode.ask("forget", blocks[1])
        each = [random.sample(range(kv_ranks.BLOCKS), 2 * together) for _ in range(2)]
        parts = [[ids[2 * i : 2 * i + 2] for ids in each] for i in range(together)]
        for number, (theirs, _) in enumerate(parts, 10):
            pair.prefill.ask("prefilled", number, theirs)
        for number, (_, ours) in enumerate(parts, 10):
            pair.decode.ask("pull", number, ours)
        for number, (_, ours) in enumerate(parts, 10):
            pair.ended(number)
            one["right"].append(pair.decode.ask("right", number, ours))
        one["invalid"] = pair.decode.ask("invalid")
        one["seconds"] = time.monotonic() - began
        pair.prefill.ask("prefilled", 90, [1, 2])
        pair.prefill.ask("swap")
        pair.decode.ask("pull", 90, [3, 4])
        pair.ended(90)
        one["swapped_right"] = pair.decode.ask("right", 90, [3, 4])
        pair.stop()
        found.append(one)
    return found


class Pool:
    """Blocks of a server that are free; what is taken comes back, or is missing at the end."""

    def __init__(self) -> None:
        self.free = list(range(kv_ranks.BLOCKS))

    def take(self, count: int) -> list[int]:
        random.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def back(self, blocks: list[int]) -> None:
        assert not set(self.free) & set(blocks), "a block was given back twice"
        self.free += blocks


def share(pair: Pair, running: dict[int, list[Any]]) -> None:
    """Note, for each request, which of its blocks are reported as not loaded; it is said once."""
    invalid = set(pair.decode.ask("invalid"))
    for state in running.values():
        state[4] |= invalid & set(state[2])


def storm(setup: dict[str, Any], count: int) -> dict[str, Any]:
    """So many requests, eight at a time, while the faults change."""
    pair, pools = Pair(), (Pool(), Pool())
    pair.start(**setup)
    found: dict[str, Any] = dict.fromkeys(("right", "wrong", "failed", "given_up"), 0)
    kinds, running, number, slowest = ("messages", "refuse", "pause", ""), {}, 0, 0.0
    while number < count or running:
        while number < count and len(running) < 8:
            if number % 6 == 0:
                kind = kinds[number // 6 % len(kinds)]
                for one in (pair.prefill, pair.decode):
                    one.ask("fault", kind)
                if kind == "pause":
                    pair.prefill.signal(signal.SIGSTOP)
                    time.sleep(0.3)
                    pair.prefill.signal(signal.SIGCONT)
            size = needs(random.choice(LENGTHS))
            blocks = [pool.take(size) for pool in pools]
            # A decode server that has the prompt, or whose client hung up, wants nothing.
            wanted = [] if number % 5 == 4 else blocks[1]
            # Decode may ask before prefill has computed.
            if number % 3 == 0:
                pair.decode.ask("pull", number, wanted)
            pair.prefill.ask("prefilled", number, blocks[0])
            if number % 3:
                pair.decode.ask("pull", number, wanted)
            running[number] = [time.monotonic(), *blocks, wanted, set()]
            number += 1
        share(pair, running)
        for name, (began, theirs, ours, wanted, left) in list(running.items()):
            assert time.monotonic() - began < SECONDS, f"request {name} hangs: {left}"
            state = running[name]
            if theirs and pair.prefill.ask("is_freed", name):
                pools[0].back(theirs)
                state[1] = []
            if wanted and not pair.decode.ask("is_pulled", name):
                continue
            if ours and (wanted or not state[1]):
                share(pair, running)
                if not wanted:
                    found["given_up"] += 1
                elif state[4]:
                    found["failed"] += 1
                else:
                    good = pair.decode.ask("right", name, ours)
                    found["right" if good else "wrong"] += 1
                pair.decode.ask("forget", ours)
                pools[1].back(ours)
                state[2] = []
            if not (state[1] or state[2]):
                slowest = max(slowest, time.monotonic() - began)
                del running[name]
        time.sleep(0.01)
    time.sleep(2)
    found["late_writes"] = not pair.decode.ask("untouched", [])
    found["leaked"] = [kv_ranks.BLOCKS - len(pool.free) for pool in pools]
    return found | {"slowest": slowest}


def killed(setup: dict[str, Any]) -> dict[str, Any]:
    """Prefill, and then decode, is killed in the middle of a push; the other goes on."""
    pair, found = Pair(), {}
    pair.start(**setup)
    pair.prefill.ask("fault", "hold")
    pair.prefill.ask("prefilled", 1, [1, 2, 3])
    pair.decode.ask("pull", 1, [4, 5, 6])
    until(lambda: pair.prefill.ask("writing"), SECONDS)
    pair.prefill.signal(signal.SIGKILL)
    found["failed_after"] = until(lambda: pair.decode.ask("is_pulled", 1), SECONDS)
    found["invalid"] = pair.decode.ask("invalid")
    pair.decode.ask("forget", [4, 5, 6])

    pair.prefill = Process("prefill")
    pair.decode.ask("find", pair.prefill.ask("start", setup))
    pair.prefill.ask("prefilled", 2, [3, 2, 1])
    pair.decode.ask("pull", 2, [6, 7, 8])
    pair.ended(2)
    found["restarted_right"] = pair.decode.ask("right", 2, [6, 7, 8])
    found["late_writes"] = not pair.decode.ask("untouched", [6, 7, 8])

    pair.prefill.ask("fault", "hold")
    pair.prefill.ask("prefilled", 3, [4, 5, 6])
    pair.decode.ask("pull", 3, [1, 2, 3])
    until(lambda: pair.prefill.ask("writing"), SECONDS)
    pair.decode.signal(signal.SIGKILL)
    pair.prefill.ask("fault", "")
    found["freed_after"] = until(lambda: pair.prefill.ask("is_freed", 3), SECONDS)

    addresses, pair.decode = pair.prefill.ask("addresses"), Process("decode")
    pair.decode.ask("start", setup)
    pair.decode.ask("find", addresses)
    pair.prefill.ask("prefilled", 4, [4, 5, 6])
    pair.decode.ask("pull", 4, [1, 2, 3])
    pair.ended(4)
    found["another_right"] = pair.decode.ask("right", 4, [1, 2, 3])
    return found

"""Ranks of MooncakeConnectorV1 in processes of their own, over Mooncake's engine and TCP.

The process that imports this has the release imported, and forks a child for each rank: the engine
of a process is one rank's. ASCEND_KV_ENGINE is `tcp`.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from typing import Any

import torch
from ascend_kv import ROLES, Pair
from ascend_kv_engine import free_port
from ascend_kv_pulled import LINES, LOCAL, REMOTE

SECONDS = 60.0


class Rank:
    """A rank in a child; what it is asked it answers in order.

    Args:
        patched: Whether the child has the shim's patch, where this process has.
    """

    def __init__(self, role: str, rank: int, *, patched: bool, **given: Any) -> None:
        self.role, self.rank = role, rank
        self._here, there = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(there, (role, rank), patched, given)
            finally:
                os._exit(0)

    def ask(self, name: str, *arguments: Any) -> None:
        self._here.send((name, arguments))

    def answer(self) -> Any:
        assert self._here.poll(SECONDS), f"{self.role} {self.rank} does not answer"
        found = self._here.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        for one in (signal.SIGCONT, signal.SIGKILL):
            os.kill(self.pid, one)
        os.waitpid(self.pid, 0)


def _serve(there: Any, only: tuple[str, int], patched: bool, given: dict) -> None:
    try:
        torch.set_num_threads(1)
        if not patched:
            import ascend_patch

            ascend_patch.revert("kv_connector")
        pair = Pair(only=only, **given)
        there.send("ready")
    except Exception as error:
        there.send(type(error)(str(error)))
        return
    while True:
        name, arguments = there.recv()
        if name == "pull":
            request, local, remote = arguments
            worker = pair.decode[0]
            worker.start_load_kv(pair.metadata(request, local, remote))
            began = time.monotonic()
            found: Any = pair.heard(worker, request, SECONDS - 5, reported=True)
            found["seconds"] = round(time.monotonic() - began, 2)
        elif name == "ended":
            found = pair.heard(pair.decode[0], *arguments)
        elif name == "lines":
            found = list(LINES)
        else:
            found = getattr(pair, name)(*arguments)
        there.send(found)


class Ranks:
    """All ranks of a pair; a context manager that ends them."""

    def __init__(self, prefill: int, decode: int, heads: int, *, unpatched=(), **given: Any):
        given = {"prefill": prefill, "decode": decode, "heads": heads, **given}
        given["ports"] = free_port(prefill + decode), 0
        given["ports"] = given["ports"][0], given["ports"][0] + prefill
        self.prefill, self.decode = (
            [Rank(role, n, patched=role not in unpatched, **given) for n in range(size)]
            for role, size in zip(ROLES, (prefill, decode), strict=True)
        )

    def __enter__(self) -> Ranks:
        try:
            for rank in (*self.prefill, *self.decode):
                rank.answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for rank in (*self.prefill, *self.decode):
            rank.stop()

    def each(self, ranks: list[Rank], name: str, *arguments: Any) -> list:
        """Ask several at once."""
        for rank in ranks:
            rank.ask(name, *arguments)
        return [rank.answer() for rank in ranks]

    def moved(self, request: str, local: list[int], remote: list[int]) -> dict:
        self.each(self.prefill, "offer", request)
        heard = self.each(self.decode, "pull", request, local, remote)
        asked = {
            "right": self.each(self.decode, "right", local, remote),
            "freed": self.each(self.prefill, "freed", request, 4.0),
            "lines": self.each(self.decode, "lines"),
        }
        found = {name: list(itertools.chain(*answers)) for name, answers in asked.items()}
        return {"heard": heard, **found}


def moved(seed: int, prefill: int, decode: int, heads: int, **given: Any) -> dict:
    try:
        with Ranks(prefill, decode, heads, seed=seed, **given) as ranks:
            return ranks.moved("one", LOCAL, REMOTE)
    except ValueError as error:
        return {"raised": str(error)}


RATIOS = ((1, 1, 2), (2, 2, 4), (2, 1, 4), (2, 1, 1), (1, 2, 4), (1, 2, 1))


def many(seed: int) -> dict:
    """A request of 700 scattered blocks: 4200 ranges, more than the engine takes at once."""
    blocks = 700
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    found = {}
    for prefill, decode in ((1, 1), (1, 2)):
        with Ranks(prefill, decode, 2, seed=seed, blocks=blocks) as ranks:
            local, remote = order[:690], order[5:695]
            found[f"{prefill} -> {decode}"] = ranks.moved("many", local, remote)
            # An engine that was given too much takes nothing more.
            found[f"then {prefill} -> {decode}"] = ranks.moved("again", local, remote[::-1])
    return found


def dead(seed: int, number: int) -> dict:
    """Prefill is killed, or stopped, before decode asks for what it offered."""
    with Ranks(1, 2, 2, seed=seed) as ranks:
        first = ranks.moved("one", LOCAL, REMOTE)
        ranks.each(ranks.prefill, "offer", "two")
        os.kill(ranks.prefill[0].pid, number)
        heard = ranks.each(ranks.decode, "pull", "two", LOCAL, REMOTE)
        found = {"first": first, "heard": heard}
        if number == signal.SIGSTOP:
            # Nothing is given back while its bytes may come.
            found["kept"] = ranks.each(ranks.decode, "ended", "two", 1.0)
            os.kill(ranks.prefill[0].pid, signal.SIGCONT)
            found["ended"] = ranks.each(ranks.decode, "ended", "two", 15.0)
            found["freed"] = ranks.each(ranks.prefill, "freed", "two", 8.0)
            time.sleep(6.0)  # for five seconds it is taken to be silent
            found["next"] = ranks.moved("three", LOCAL, REMOTE)
        return found


def everything(seed: int, patched: bool) -> dict[str, Any]:
    """All cases, by name."""
    found: dict[str, Any] = {"ratios": {}, "many": None}
    for prefill, decode, heads in RATIOS:
        if patched or prefill >= decode:
            name = f"{prefill} -> {decode}, {heads} heads"
            found["ratios"][name] = moved(seed, prefill, decode, heads)
    if not patched:
        with Ranks(1, 1, 2, seed=seed, blocks=700) as ranks:
            order = torch.randperm(700, generator=torch.Generator().manual_seed(seed)).tolist()
            found["many"] = ranks.moved("many", order[:690], order[5:695])
        return found
    found["many"] = many(seed)
    plain, told = ROLES[0], {"told": (1, 1)}
    found["plain prefill"] = {
        "1 -> 2": moved(seed, 1, 2, 4, unpatched=(plain,), **told),
        "2 -> 1": moved(seed, 2, 1, 4, unpatched=(plain,)),
        "2 -> 2": moved(seed, 2, 2, 4, unpatched=(plain,)),
        "2 -> 4, 4 heads": moved(seed, 2, 4, 4, unpatched=(plain,), told=(2, 2)),
        "2 -> 4, 1 heads": moved(seed, 2, 4, 1, unpatched=(plain,), told=(2, 2)),
    }
    found["plain decode"] = {"2 -> 1": moved(seed, 2, 1, 4, unpatched=(ROLES[1],))}
    found["killed"] = dead(seed, signal.SIGKILL)
    found["stopped"] = dead(seed, signal.SIGSTOP)
    return found

"""The ranks of a prefill and of a decode server as two processes, with Mooncake's real engine.

Real are vLLM's connector, its listener and messages, our patch, and the engine over TCP; there is
no model: a prefill rank fills its cache with numbers that say where each belongs. Run by
test_kv_processes_e2e.py with an interpreter that has all of it; prints what it saw as JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import kv_engine
import kv_ranks
import torch

# A block of 128 tokens, as vLLM's; more of them than a storm needs at a time.
kv_ranks.LAYERS, kv_ranks.BLOCKS, kv_ranks.TOKENS, kv_ranks.WIDTH = 3, 40, 128, 16
fork = multiprocessing.get_context("fork")


class Engines:
    """One engine for each rank of a process, for as long as it runs.

    The end of one takes a second, in which nothing else of its process goes on.
    """

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.used = 0

    def __call__(self) -> Any:
        if self.used == len(self.made):
            from mooncake.engine import TransferEngine

            self.made.append(TransferEngine())
            assert self.made[-1].initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self.used += 1
        return self.made[self.used - 1]


class Faults:
    """What goes wrong in a process, by the name that it was last told.

    messages: of each three control messages one is lost and one comes twice.
    refuse: each third push writes its first half, and then fails.
    hold: a push stops half-way for as long as this is the fault.
    """

    def __init__(self) -> None:
        self.name, self.count, self.writing = "", 0, False

    def losing(self, send: Any) -> Any:
        async def lose(owner: Any, *args: Any) -> None:
            self.count += 1
            for _ in range((0, 2, 1)[self.count % 3] if self.name == "messages" else 1):
                await send(owner, *args)

        return lose

    def pushing(self, push: Callable[..., int]) -> Callable[..., int]:
        def halves(session: str, *lists: list[int]) -> int:
            self.count += 1
            half = len(lists[0]) // 2
            if self.name not in ("refuse", "hold"):
                return push(session, *lists)
            code = push(session, *(one[:half] for one in lists))
            if self.name == "refuse" and self.count % 3 == 0:
                return -1
            self.writing = self.name == "hold"
            while self.name == "hold":
                time.sleep(0.02)
            return code or push(session, *(one[half:] for one in lists))

        return halves


class Half:
    """The ranks of one server, told what to do by `serve`."""

    def __init__(self, role: str) -> None:
        from ascend_patch.impl import kv_vllm, kv_vllm_link, kv_vllm_send

        self.sender = kv_vllm.SENDER
        self.role, self.faults, self.world = role, Faults(), None
        self.engines = Engines()
        self.freed: set[str] = set()
        kv_vllm_link.Link.send = self.faults.losing(kv_vllm_link.Link.send)
        kv_vllm_send.Sender._repeat = self.faults.losing(kv_vllm_send.Sender._repeat)

    async def start(self, setup: dict[str, Any]) -> dict[int, str]:
        self.engines.used = 0
        engines = (self.engines, kv_engine.Engine)
        engines = engines if self.role == "prefill" else engines[::-1]
        host = importlib.import_module(kv_engine.MODULE)
        self.world = kv_ranks.World(host, **setup, engines=engines)
        self.freed = set()
        if self.role == "prefill":
            await self.world.__aenter__()
            for rank in self.world.prefill:
                worker = rank.worker
                worker._send_blocks = self.faults.pushing(worker._send_blocks)
        return self.world.addresses

    async def addresses(self) -> dict[int, str]:
        return self.world.addresses

    async def stop(self) -> None:
        await self.world.__aexit__()
        for rank in self.world.prefill if self.role == "prefill" else self.world.decode:
            addresses = list(rank.worker.kv_caches_base_addr)
            if self.role == "prefill":
                staging = getattr(rank.worker, self.sender).pusher._staging
                addresses += [] if staging is None else [staging.data_ptr()]
            assert rank.engine.batch_unregister_memory(addresses) == 0

    async def find(self, addresses: dict[int, str]) -> None:
        self.world.addresses = addresses
        for one in self.world.receivers:
            one._agents.clear()

    async def fault(self, name: str) -> None:
        self.faults.name = name

    async def writing(self) -> bool:
        return self.faults.writing

    async def prefilled(self, number: int, blocks: list[int]) -> None:
        await self.world.prefilled(number, blocks)

    async def swap(self) -> None:
        for rank in self.world.prefill:
            rank.cache.copy_(rank.cache.roll(1, dims=3))

    async def is_freed(self, number: int) -> bool:
        for rank in self.world.prefill:
            done = await rank.worker.fetch_finished_sending_reqs()
            self.freed |= {f"{rank.number}:{name}" for name in done}
        return all(f"{rank.number}:p{number}" in self.freed for rank in self.world.prefill)

    async def pull(self, number: int, blocks: list[int]) -> None:
        await self.world.pull(number, blocks)

    async def is_pulled(self, number: int) -> bool:
        return self.world.pulled(number)

    async def invalid(self) -> list[int]:
        return sorted(self.world.invalid())

    async def right(self, number: int, blocks: list[int]) -> bool:
        return self.world.right(number, blocks)

    async def forget(self, blocks: list[int]) -> None:
        """Blocks that are given away: nobody may write to them any more."""
        for rank in self.world.decode:
            rank.cache[:, blocks] = float("nan")

    async def untouched(self, blocks: list[int]) -> bool:
        return self.world.untouched(blocks)


async def serve(role: str, pipe: Any) -> None:
    half, loop = Half(role), asyncio.get_running_loop()
    while (told := await loop.run_in_executor(None, pipe.recv)) is not None:
        pipe.send(await getattr(half, told[0])(*told[1:]))


class Process:
    """One of the two, from outside: what `Half` can do, by name."""

    def __init__(self, role: str) -> None:
        self.pipe, theirs = fork.Pipe()
        run = lambda: asyncio.run(serve(role, theirs))  # noqa: E731
        self.process = fork.Process(target=run, daemon=True)
        self.process.start()

    def ask(self, name: str, *given: Any) -> Any:
        self.pipe.send((name, *given))
        assert self.pipe.poll(60), f"no answer to {name} within 60 s"
        return self.pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"it did not happen within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - began


def main(asked: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run functions of kv_process_cases, one after the other; what is imported is imported once."""
    cases = importlib.import_module("kv_process_cases")
    importlib.import_module(kv_engine.MODULE)
    torch.set_num_threads(1)
    return [getattr(cases, name)(**given) for name, given in asked]


if __name__ == "__main__":
    # So that kv_process_cases finds this module by its name.
    sys.modules["kv_process_ranks"] = sys.modules["__main__"]
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    # The engines' threads are not waited for; the two processes are daemons.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)

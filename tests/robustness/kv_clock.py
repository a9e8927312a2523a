"""A virtual clock and an event loop on it: hours of timeouts pass in the time their code takes.

Only what the loop runs exists: no thread and no socket. Where a real loop would wait, this one
moves its clock to the next timer.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# The real clock, whatever a module calls `time` later.
REAL = time
START = 1_000.0
# What one turn of the loop takes.
TURN_S = 1e-6


class _Selector:
    """Waits by moving the clock; no file ever becomes ready."""

    def __init__(self, loop: VirtualLoop, real: Any) -> None:
        self._loop, self._real = loop, real

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the loop waits for something that nothing will bring about")
        # Code takes time too: what waits for 0 s until a moment has passed sees it pass.
        self._loop.now += max(TURN_S, timeout)
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes when nothing is left to do; `executors` run what is handed to them."""

    def __init__(self) -> None:
        self.now = START
        super().__init__()
        self._selector = _Selector(self, self._selector)
        # What the loop logs and would otherwise swallow: exceptions of forgotten tasks.
        self.complaints: list[str] = []
        self.set_exception_handler(self._complain)

    def _complain(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.complaints.append(f"{context.get('message')}: {error!r}")

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """A `submit_virtual` of the executor decides when it ends; without one it is done."""
        submit = getattr(executor, "submit_virtual", None)
        if submit is not None:
            return submit(func, *args)
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def pass_time(self, seconds: float) -> None:
        """Run everything that is due within so many virtual seconds."""
        self.run_until_complete(asyncio.sleep(seconds))

    def until(self, condition: Callable[[], bool], seconds: float, step: float = 0.05) -> bool:
        """Let time pass until it holds; False if it does not within so many seconds."""
        end = self.now + seconds
        while not condition():
            if self.now >= end:
                return False
            self.pass_time(min(step, max(end - self.now, 1e-3)))
        return True


class Identities:
    """Stands in for the module `uuid`: the same in each world, so that a run can be repeated."""

    def __init__(self) -> None:
        self.numbers = random.Random(0)

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self.numbers.getrandbits(128), version=4)


class Clock:
    """Stands in for the module `time` in the modules under test; `loop` is the current world's."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None
        # Whether an address (tcp://host:port) accepts connections; None: nothing tells.
        self.identities = Identities()
        self.accepts: Callable[[str], bool | None] = lambda _: None

    def _now(self) -> float:
        return REAL.monotonic() if self.loop is None else self.loop.now

    monotonic = perf_counter = time = _now

    def monotonic_ns(self) -> int:
        return int(self._now() * 1e9)

    perf_counter_ns = time_ns = monotonic_ns

    def sleep(self, seconds: float) -> None:
        """A thread that sleeps; here there are none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(REAL, name)

    async def open_connection(self, host: str, port: int, **_: Any) -> tuple[Any, Any]:
        """Stands in for asyncio.open_connection."""
        accepted = self.accepts(f"tcp://{host}:{port}")
        await asyncio.sleep(1e9 if accepted is None else 1e-3)
        if not accepted:
            raise ConnectionRefusedError
        return None, types.SimpleNamespace(close=lambda: None)


@contextmanager
def virtual_time(*modules: types.ModuleType) -> Iterator[Clock]:
    """Give these modules, and every loaded one of the connector, the virtual clock."""
    clock = Clock()
    changed: list[tuple[Any, str, Any]] = []
    for module in {*modules, *_connector()}:
        for name, real, virtual in (("time", REAL, clock), ("uuid", uuid, clock.identities)):
            if getattr(module, name, None) is real:
                setattr(module, name, virtual)
                changed.append((module, name, real))
    connect = asyncio.open_connection
    asyncio.open_connection = clock.open_connection  # type: ignore[assignment]
    try:
        yield clock
    finally:
        asyncio.open_connection = connect
        for module, name, real in changed:
            setattr(module, name, real)


def _connector() -> list[types.ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("ascend_patch.impl.kv_") and module is not None
    ]

"""Prefill and decode servers on a virtual clock: vLLM's worker class, the shim, and their owners.

Real are the host's listener, messages and bookkeeping, and the shim's Sender, Receiver and links.
Simulated are time, ZMQ's sockets (`kv_channel`), and Mooncake's engine: its writes take as long as
a test decides, and land piece by piece. What is right is decided here from who owns which block,
and from the bytes in them; nothing of it is asked of the code under test.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import itertools
import sys
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

import kv_ranks
import msgspec
from kv_changes import FIELD
from kv_channel import Context, Dealer, Network, Process
from kv_clock import VirtualLoop

HEADS = 6
# Seconds: a pull's limit, and what may come on top until it is reported (polls, a back-off).
PULL_S, GRACE_S = 20.0, 15.0
# After which prefill frees what nobody fetched; the host's own setting.
EXPIRE_S = 60
TICK_S = 0.25
# What a process that ended had written to a socket may be read from it for so long.
RESIDUE_S = 1.0
# The share of blocks that may be kept for writers that may live on.
QUARANTINE = 0.6
THREADS = 4
# How many bytes of numbers tell requests apart, see kv_ranks.truth.
EACH = 10_000

_process: contextvars.ContextVar[Host | None] = contextvars.ContextVar("process", default=None)


class Host(Process):
    """A process with its tasks and, if it sends, its threads."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.tasks: set[asyncio.Task[Any]] = set()


@dataclass
class Fortune:
    """What becomes of one push: how long it takes, whether it fails, whether it stalls."""

    seconds: float = 0.01
    code: int = 0
    stalls: bool = False


@dataclass(eq=False)
class Write:
    """One push: byte ranges that land one after the other, until it ends."""

    threads: Threads
    fortune: Fortune
    ranges: list[tuple[int, int, int, bytes | None, str, int]] = field(default_factory=list)
    landed: int = 0
    ended: bool = False
    future: Any = None
    result: Any = None

    def land(self, upto: int) -> None:
        """Let the ranges before this one arrive."""
        while self.landed < min(upto, len(self.ranges)):
            self.threads.world.land(self, *self.ranges[self.landed])
            self.landed += 1

    def go_on(self, upto: int) -> None:
        """The same, unless its process has ended."""
        if not self.ended:
            self.land(upto)

    def end(self) -> None:
        """The last bytes arrive (those before the failure, if it fails), and the thread is told."""
        if self.ended:
            return
        self.ended = True
        self.land(len(self.ranges) // 2 if self.fortune.code else len(self.ranges))
        self.threads.finish(self)


class Threads:
    """The executor of a prefill rank, of which a test decides when its threads come to an end."""

    def __init__(self, world: SimWorld, process: Host) -> None:
        self.world, self.process = world, process
        self.fortunes: deque[Fortune] = deque()
        self.running: list[Write] = []
        self.queue: deque[tuple[Any, Callable[..., Any], tuple[Any, ...]]] = deque()
        self.current: Write | None = None

    def submit_virtual(self, func: Callable[..., Any], *args: Any) -> Any:
        future = self.world.loop.create_future()
        self.queue.append((future, func, args))
        self._next()
        return future

    def _next(self) -> None:
        while self.queue and len(self.running) < THREADS and self.process.alive:
            future, func, args = self.queue.popleft()
            # As concurrent.futures: what was cancelled before it began never begins.
            if future.cancelled():
                continue
            fortune = self.fortunes.popleft() if self.fortunes else Fortune()
            write = self.current = Write(self, fortune, future=future)
            try:
                write.result = (func(*args), None)
            except Exception as error:
                write.result = (None, error)
            self.current = None
            self.running.append(write)
            self._begin(write)

    def _begin(self, write: Write) -> None:
        call = self.world.loop.call_later
        if write.fortune.stalls:
            call(0.01, write.go_on, max(1, len(write.ranges) // 2))
            return
        call(write.fortune.seconds / 2, write.go_on, len(write.ranges) // 2)
        call(write.fortune.seconds, write.end)

    def finish(self, write: Write) -> None:
        if write in self.running:
            self.running.remove(write)
        if not self.process.alive:
            return
        value, error = write.result
        if not write.future.done():
            if error is None:
                write.future.set_result(value)
            else:
                write.future.set_exception(error)
        self._next()

    def kill(self) -> None:
        """The process ends: what its kernel had taken may still arrive, the rest never does."""
        for write in self.running:
            write.ended = True
            upto = min(len(write.ranges), write.landed + 1)
            self.world.loop.call_later(RESIDUE_S, write.land, upto)
        self.running.clear()
        self.queue.clear()

    def shutdown(self, **_: Any) -> None:
        """Nothing is left to wait for."""


class Engine:
    """Mooncake's engine of one rank."""

    def __init__(self, world: SimWorld) -> None:
        self.world = world
        self.port = world.next_port()
        self.memory: list[tuple[int, int]] = []
        self.threads: Threads | None = None
        self.calls = 0

    def get_rpc_port(self) -> int:
        return self.port

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> int:
        self.memory += zip(addresses, lengths, strict=True)
        return 0

    def batch_transfer_sync_write(
        self, session: str, local: list[int], remote: list[int], lengths: list[int]
    ) -> int:
        assert self.threads is not None
        assert self.threads.current is not None, "a write outside of the sender's threads"
        self.calls += 1
        write = self.threads.current
        for source, target, length in zip(local, remote, lengths, strict=True):
            inside = any(a <= source and source + length <= a + n for a, n in self.memory)
            if not inside:
                self.world.violation(f"{length} bytes are read from memory that is not registered")
                continue
            # A buffer is used again at once; a cache is read when the bytes go.
            cached = any(a <= source < a + n for a, n in self.world.caches[self])
            copied = None if cached else ctypes.string_at(source, length)
            number = _number(ctypes.string_at(source, 4))
            write.ranges.append((source, target, length, copied, session, number))
        return write.fortune.code


def _number(first: bytes) -> int:
    """The request that a float32 of kv_ranks.truth belongs to; -1 if it is none."""
    value = ctypes.c_float.from_buffer_copy(first).value
    return int(value // EACH) if value == value else -1


@dataclass
class Request:
    """One request, as its owners see it.

    Attributes:
        ended: `loaded`, `failed`, or empty while it is waited for.
        back: Its decode blocks were given back.
        freed: Its prefill blocks were.
    """

    number: int
    decode_blocks: list[int]
    prefill_blocks: list[int]
    deadline: float
    generation: int
    ended: str = ""
    failed: bool = False
    back: bool = False
    freed: bool = False
    prefilled: bool = False
    # Another process took the address of the one that was asked: nothing tells that that one ended.
    doubtful: bool = False
    finished: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)


class SimWorld(kv_ranks.World):
    """A prefill and a decode server; `violations` says what went wrong, in sentences."""

    def __init__(self, lab: Any, prefill_tp: int, decode_tp: int, **setup: Any) -> None:
        self.loop = VirtualLoop()
        self.clock, host = lab.clock, lab.host
        self.clock.identities.numbers.seed(0)
        asyncio.set_event_loop(self.loop)
        self.loop.set_task_factory(self._new_task)  # type: ignore[arg-type]
        self.network = Network(self.loop)
        self.clock.loop, self.clock.accepts = self.loop, self.network.accepts
        self.violations: list[str] = []
        self.caches: dict[Any, list[tuple[int, int]]] = {}
        self._ports = iter(range(30_000, 60_000))
        self.generation = 0
        self.requests: dict[int, Request] = {}
        self.count = 0
        self.decode_owner: dict[int, int] = {}
        self.prefill_owner: dict[int, int] = {}
        self.decode_process = Host("decode")
        self.sizes, self.setup = (prefill_tp, decode_tp), setup
        make = lambda: Engine(self)  # noqa: E731
        setup = {"heads": HEADS, "timeout": PULL_S} | setup
        with _sockets(Context(self.network, self.decode_process)):
            super().__init__(host, prefill_tp, decode_tp, engines=(make, make), **setup)
        self.executor.shutdown()
        for receiver in self.receivers:
            kept = getattr(receiver, "quarantine", None)
            if kept is not None:
                kept.share = QUARANTINE
        self.decode_context = self.context
        self.processes: list[Host] = []
        for rank in (*self.prefill, *self.decode):
            self._remember(rank)
        self.ports_of = {rank.worker.rpc_port: rank for rank in self.decode}
        # A message that asks for a request, of which others are made.
        self.template: dict[str, Any] | None = None
        self.network.seen = self._see
        self.floods: list[Dealer] = []
        self._flooded = itertools.count(1)
        self.loop.run_until_complete(self._start())
        self.scheduler = self.loop.create_task(self._schedule())

    def next_port(self) -> int:
        return next(self._ports)

    def violation(self, sentence: str) -> None:
        """Something that must not happen has happened."""
        self.violations.append(f"at {self.loop.now - 1000:.2f} s: {sentence}")

    def _new_task(self, loop: Any, coro: Any, **given: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, **given)
        process = _process.get()
        if process is not None:
            process.tasks.add(task)
            task.add_done_callback(process.tasks.discard)
        return task

    def _remember(self, rank: Any) -> None:
        bases = rank.worker.kv_caches_base_addr
        self.caches[rank.engine] = [(base, rank.cache[0].nbytes) for base in bases]

    async def _start(self) -> None:
        for rank in self.prefill:
            process = Host(f"prefill {rank.number} of generation {self.generation}")
            self.processes.append(process)
            self.context = Context(self.network, process)
            self.executor = rank.engine.threads = Threads(self, process)
            token = _process.set(process)
            await self.listen(rank)
            _process.reset(token)

    # What the schedulers and the proxy do.

    def free(self, owners: dict[int, int]) -> list[int]:
        """Blocks of a pool that nobody owns."""
        return [block for block in range(kv_ranks.BLOCKS) if block not in owners]

    def request(self, size: int, prefill_after: float | None, pull_after: float) -> Request:
        """Send a request through both servers; prefill computes it after so many seconds."""
        self.count += 1
        number = self.count
        decode, prefill = (self.free(o)[:size] for o in (self.decode_owner, self.prefill_owner))
        # Prefill has blocks for what it computes.
        prefill = prefill if prefill_after is not None else []
        assert len(decode) == size
        assert len(prefill) in (0, size)
        one = Request(number, decode, prefill, float("inf"), self.generation)
        self.decode_owner.update(dict.fromkeys(decode, number))
        self.prefill_owner.update(dict.fromkeys(prefill, number))
        self.requests[number] = one
        if prefill_after is not None:
            self.loop.call_later(prefill_after, self._spawn, self._prefill(one))
        self.loop.call_later(pull_after, self._spawn, self._pull(one))
        return one

    def _spawn(self, coro: Any) -> None:
        task = self.loop.create_task(coro)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.violation(f"the host's step raised {task.exception()!r}")

    async def _prefill(self, one: Request) -> None:
        if one.generation != self.generation or one.freed or one.prefilled:
            return
        one.prefilled = True
        await self.prefilled(one.number, one.prefill_blocks)

    async def _pull(self, one: Request) -> None:
        one.deadline = self.loop.now + PULL_S + GRACE_S
        token = _process.set(self.decode_process)
        await self.pull(one.number, one.decode_blocks)
        _process.reset(token)

    def abort_prefill(self, one: Request) -> None:
        """Prefill ends a request with nothing to send."""
        if one.generation == self.generation and not one.prefilled and not one.freed:
            one.prefilled = True
            self._spawn(self._abort(one))

    async def _abort(self, one: Request) -> None:
        for rank in self.prefill:
            await self.record(rank, one.number, [])
            metadata = self.host.MooncakeConnectorMetadata()
            metadata.reqs_not_processed.add(f"t{one.number}")
            await rank.worker.record_send_reqs(metadata)
        self._prefill_back(one)

    async def _schedule(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for rank in self.decode:
                for name in await rank.worker.fetch_finished_recving_reqs():
                    self._finished(rank, self.requests[int(name[1:])])
            self._fail(self.invalid())
            for one in self.requests.values():
                self._judge(one)
            for rank in self.prefill:
                for name in await rank.worker.fetch_finished_sending_reqs():
                    self._sent(rank, name)

    def _finished(self, rank: Any, one: Request) -> None:
        if one.back or rank.number in one.finished:
            self.violation(f"decode rank {rank.number} reports request {one.number} twice")
        one.finished.add(rank.number)

    def _fail(self, blocks: set[int]) -> None:
        for block in blocks:
            owner = self.decode_owner.get(block)
            if owner is None:
                self.violation(f"block {block}, which nobody has, is reported as not loaded")
            else:
                self.requests[owner].failed = True
                self.requests[owner].ended = "failed"

    def _judge(self, one: Request) -> None:
        if one.back:
            return
        if len(one.finished) == len(self.decode):
            if not one.failed:
                one.ended = "loaded"
                if not self.right(one.number, one.decode_blocks):
                    self.violation(f"request {one.number} is reported as loaded, and is wrong")
            self._decode_back(one)
        elif not one.ended and self.loop.now > one.deadline:
            self.violation(f"request {one.number} has no end after {PULL_S + GRACE_S:.0f} s")
            one.ended = "late"

    def _decode_back(self, one: Request) -> None:
        one.back = True
        for block in one.decode_blocks:
            del self.decode_owner[block]
        for rank in self.decode:
            rank.cache[:, one.decode_blocks] = float("nan")

    def _sent(self, rank: Any, name: str) -> None:
        # An attempt may have come before the request did; then there is no name.
        one = self.requests.get(int(name[1:])) if name else None
        if one is None or one.freed or rank.number in one.sent:
            self.violation(f"prefill rank {rank.number} frees {name!r}, which is not its own")
            return
        one.sent.add(rank.number)
        if len(one.sent) == len(self.prefill):
            self._prefill_back(one)

    def _prefill_back(self, one: Request) -> None:
        one.freed = True
        for block in one.prefill_blocks:
            del self.prefill_owner[block]
        for rank in self.prefill:
            rank.cache[:, one.prefill_blocks] = float("nan")

    # What the engines, the network and the operators do.

    @property
    def writes(self) -> list[Write]:
        """Pushes that are under way."""
        threads = [rank.engine.threads for rank in self.prefill]
        return [write for one in threads if one is not None for write in one.running]

    def land(
        self,
        write: Write,
        source: int,
        target: int,
        length: int,
        copied: bytes | None,
        session: str,
        number: int,
    ) -> None:
        """Bytes arrive; whose block is it now?"""
        rank = self.ports_of.get(int(session.rpartition(":")[2]))
        if rank is None:
            self.violation(f"a push goes to {session}, which is no decode rank")
            return
        for base, nbytes in self.caches[rank.engine]:
            if base <= target and target + length <= base + nbytes:
                break
        else:
            self.violation(f"{length} bytes for {session} land outside of its caches")
            return
        each = nbytes // kv_ranks.BLOCKS
        for block in range((target - base) // each, (target + length - 1 - base) // each + 1):
            owner = self.decode_owner.get(block)
            if owner != number:
                self.violation(
                    f"bytes of request {number} land in block {block} (decode "
                    f"rank {rank.number}), which was given back and belongs to {owner or 'nobody'}"
                )
                return
        if copied is None:
            ctypes.memmove(target, source, length)
        else:
            ctypes.memmove(target, copied, length)

    def addresses_of(self) -> list[str]:
        """Where the prefill ranks listen."""
        return [self.addresses[number] for number in sorted(self.addresses)]

    def restart(self, *, same_ports: bool) -> None:
        """The prefill server ends, whatever it did, and another one is there at once."""
        for process, rank in zip(self.processes, self.prefill, strict=True):
            self.network.end(process)
            rank.engine.threads.kill()
            for task in list(process.tasks):
                task.cancel()
        self.loop.pass_time(0)
        self.listening.clear()
        self.generation += 1
        old = self.addresses_of()
        for one in self.requests.values():
            one.freed = True
            one.doubtful = one.doubtful or (same_ports and not one.back)
        self.prefill_owner.clear()
        self._graveyard = [*getattr(self, "_graveyard", []), *self.prefill]
        # What is left of the old process may still be on its way: its memory stays.
        self.prefill = [
            kv_ranks.Rank(self.host, rank.side, rank.number, "kv_producer", Engine(self))
            for rank in self.prefill
        ]
        for rank in self.prefill:
            self._remember(rank)
        self.processes, self.addresses = [], {}
        if same_ports:
            ports = iter([int(one.rpartition(":")[2]) for one in old])
            kept, self.network.ports = self.network.ports, ports  # type: ignore[assignment]
            self.loop.run_until_complete(self._start())
            self.network.ports = kept
        else:
            self.loop.run_until_complete(self._start())

    # Another decode server, hostile or merely busy.

    def _see(self, direction: str, address: str, frames: list[bytes]) -> None:
        if direction == "ask" and self.template is None:
            try:
                found = msgspec.msgpack.decode(frames[-1])
            except (msgspec.DecodeError, ValueError):
                return
            ours = found.get(FIELD) if isinstance(found, dict) else None
            if isinstance(ours, dict) and ours.get("kind") == "ask":
                self.template = found

    def flood(self, address: str, count: int, *kinds: str) -> None:
        """Messages of another decode server about requests that nobody else knows."""
        assert self.template is not None, "no message has been seen of which to make others"
        dealer = Dealer(self.network, Process("another decode server"))
        self.floods.append(dealer)
        dealer.connect(address)
        for _ in range(count):
            transfer = f"x{next(self._flooded)}"
            for kind in kinds:
                field = self.template[FIELD] | {
                    "kind": kind,
                    "epoch": f"{transfer}-0",
                    "puller": "another-engine",
                    "transfer": transfer,
                    "rank": 0,
                    "last": True,
                }
                message = self.template | {"req_blocks": {transfer: [transfer, [1]]}, FIELD: field}
                self.loop.run_until_complete(dealer.send(msgspec.msgpack.encode(message)))
        self.loop.pass_time(0.05)

    def end(self) -> None:
        """Stop everything, so that the loop can be closed."""
        self.clock.loop = self.loop
        tasks = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        asyncio.set_event_loop(None)
        self.clock.loop = None


@contextmanager
def _sockets(context: Context) -> Any:
    """Let World make this context in place of ZMQ's."""
    import zmq.asyncio

    real = zmq.asyncio.Context
    zmq.asyncio.Context = lambda *_, **__: context  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        zmq.asyncio.Context = real  # type: ignore[misc]

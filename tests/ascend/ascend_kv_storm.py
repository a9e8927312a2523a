"""Reads of MooncakeConnectorV1 that the engine gives up and that write all the same, in a storm.

Mooncake's engine gives a read up when its prefill rank has stopped, and writes what was asked for
when that rank goes on (seen over TCP: 35 s later the call ends with -1, and after SIGCONT the
bytes arrive). Here the engine does so on command; a pool hands blocks on as vLLM's does, and who
owns a block when it is written is looked up there. Import it after `ascend_kv`.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ascend_kv import OLDEST, Pair, host
from ascend_kv_engine import HOST, Engine, free_port
from ascend_kv_heard import newest, oldest


@dataclass
class Late:
    """An engine whose reads of some sessions are given up, and write when they are let go.

    Attributes:
        stalled: Ports of prefill ranks that have stopped, as the sessions name them.
        kept: What is to be written: ranges.
    """

    stalled: bool = False
    kept: list[tuple[list, list, list]] = field(default_factory=list)
    real: Any = Engine.batch_transfer_sync_read

    def read(self, engine: Any, session: str, local: list, remote: list, sizes: list) -> int:
        if self.stalled:
            self.kept.append((list(local), list(remote), list(sizes)))
            return -1
        return self.real(engine, session, local, remote, sizes)


class Relay:
    """A port in front of a prefill rank, which can be cut off: nothing goes either way."""

    def __init__(self, port: int) -> None:
        self.port, self._to = free_port(1), port
        self.cut = threading.Event()
        self._server = socket.create_server((HOST, self.port))
        self._open = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                there = socket.create_connection((HOST, self._to))
                self._open += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def end(self) -> None:
        """The process behind it ends, and what listens at its port."""
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while self.cut.is_set():
                    time.sleep(0.01)
                target.sendall(data)


class Pool:
    """Blocks of a decode server, as its scheduler gives them out and takes them back."""

    def __init__(self, blocks: int, draw: random.Random) -> None:
        self.owner: dict[int, str] = {}
        self.free = list(range(blocks))
        draw.shuffle(self.free)

    def take(self, request: str, count: int) -> list[int]:
        found = [self.free.pop(0) for _ in range(count)]
        self.owner.update(dict.fromkeys(found, request))
        return found

    def give(self, request: str) -> None:
        for block in [one for one, owner in self.owner.items() if owner == request]:
            del self.owner[block]
            self.free.append(block)


class Storm:
    """A decode rank with a pool, a stalled prefill rank behind a relay, and one that is well."""

    def __init__(self, seed: int, blocks: int) -> None:
        print(f"storm: seed {seed}")
        self.draw = random.Random(seed)
        self.pair = Pair(1, 1, 2, seed=seed, blocks=blocks, pull_retries=1)
        self.worker, self.late = self.pair.decode[0], Late()
        Engine.batch_transfer_sync_read = lambda *given: self.late.read(*given)
        self.pool, self.blocks = Pool(blocks, self.draw), blocks
        connector = self.connector = host.MooncakeConnector.__new__(host.MooncakeConnector)
        connector.connector_worker, connector.connector_scheduler = self.worker, None
        self.failed: set[str] = set()
        self.ended: dict[str, bool] = {}
        self.wrong: list[str] = []
        # Requests that were loaded and have their blocks still, as those that decode goes on with.
        self.loaded: deque[str] = deque()
        self.expect: dict[str, tuple[list[int], list[int]]] = {}
        self.late_requests: tuple[str, ...] = ()

    def begin(self, request: str, relay: Relay | None = None) -> list[int]:
        """A request of three blocks is pulled; through a relay, or from the rank itself."""
        self.pair.offer(request)
        while len(self.pool.free) < 3:
            self.pool.give(self.loaded.popleft())
        local = self.pool.take(request, 3)
        remote = self.draw.sample(range(self.blocks), 3)
        found = self.pair.metadata(request, local, remote)
        if relay is not None:
            found.requests[request].remote_port = relay.port
        self.expect[request] = local, remote
        self.worker.start_load_kv(found)
        return local

    def step(self) -> None:
        """An engine step: what has ended gives its blocks back; what was loaded must be right."""
        done, invalid = oldest(self.connector) if OLDEST else newest(self.connector)
        failed = set(invalid) if OLDEST else {self.pool.owner.get(one, "?") for one in invalid}
        self.failed |= failed
        for request in done:
            self.ended[request] = request not in self.failed
            if self.ended[request]:
                self.compare(request)
                self.loaded.append(request)
            else:
                self.pool.give(request)
        for worker in self.pair.prefill:
            worker.get_finished()

    def compare(self, request: str) -> None:
        local, remote = self.expect[request]
        for layer, caches in enumerate(self.worker.kv_caches.values()):
            for part, cache in enumerate(caches):
                if not bool((cache[local] == self.pair.model[part, layer][remote]).all()):
                    self.wrong.append(request)

    def until(self, *requests: str, seconds: float = 30.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.step()
            if all(request in self.ended for request in requests):
                return True
            time.sleep(0.001)
        return False

    def let_go(self) -> list[str]:
        """What the stalled reads write now; the owners of blocks that were another's."""
        hurt = []
        for local, remote, sizes in self.late.kept:
            for target, source, size in zip(local, remote, sizes, strict=True):
                owner = self.pool.owner.get(self.block(target), "nobody")
                if owner not in self.late_requests:
                    hurt.append(owner)
                ctypes.memmove(target, source, size)
        self.late.kept.clear()
        for request in self.loaded:
            self.compare(request)
        return sorted(set(hurt))

    def block(self, address: int) -> int:
        for caches in self.worker.kv_caches.values():
            for cache in caches:
                size = cache[0].numel() * cache.element_size()
                offset = address - cache.data_ptr()
                if 0 <= offset < size * len(cache):
                    return offset // size
        raise AssertionError(f"address {address} is in no cache")


def storm(seed: int, variant: str, attempts: int, blocks: int = 48) -> dict[str, Any]:
    """Reads that are given up in mid-write, many newer requests, then the writes.

    Args:
        variant: `one` stalled read; `two` of them; `retries`: all attempts of one are given up
            while its rank answers; `restart`: the stalled rank ends.
    """
    run = Storm(seed, blocks)
    names = ("stalled", "stalled too")[: 2 if variant == "two" else 1]
    relays = [Relay(run.pair.port) for _ in names]
    run.late_requests = names
    # What the rank is must be known before it stops, as it is on a server that has pulled before.
    for number, relay in enumerate(relays):
        run.begin(f"before {number}", relay)
    assert run.until(*(f"before {number}" for number in range(len(relays))))
    run.late.stalled = True
    for name, relay in zip(names, relays, strict=True):
        if variant != "retries":
            relay.cut.set()
        run.begin(name, relay)
    deadline = time.monotonic() + 30
    while len(run.late.kept) < len(names) and time.monotonic() < deadline:
        run.step()
        time.sleep(0.005)
    if variant == "retries":
        # The second attempt is given up too; the first one's bytes have had their time by then.
        while len(run.late.kept) < 2 and time.monotonic() < deadline:
            run.step()
            time.sleep(0.005)
    # All of its attempts are given up before the next request is read.
    run.worker.kv_recv_thread.request_queue.join()
    run.late.stalled = False
    hurt = []
    if variant == "restart":
        # What was on its way arrives; the process has ended, and writes no more.
        relays[0].end()
        hurt += run.let_go()
    began = time.monotonic()
    number = 0
    while number < attempts or time.monotonic() - began < 8.0:
        run.begin(f"newer {number}")
        assert run.until(f"newer {number}"), f"newer {number} did not end"
        number += 1
        if number >= attempts:
            time.sleep(0.05)
    before = {name: name in run.ended for name in names}
    reported = sorted(run.failed & set(names))
    if variant == "retries":
        # Its rank answers all the while: it writes at once, or never.
        run.late.kept.clear()
    hurt += run.let_go()
    for relay in relays:
        relay.cut.clear()
    ended = run.until(*names, seconds=30.0)
    return {
        "hurt": hurt, "before": before, "reported": reported, "ended": ended,
        "as right": [name for name in names if run.ended.get(name)],
        "newer": number, "wrong": run.wrong,
        "right": sum(run.ended[f"newer {n}"] for n in range(number)),
    }  # fmt: skip


def refuses(seed: int) -> dict[str, Any]:
    """So many reads are given up that nothing more is pulled; then their rank answers."""
    run = Storm(seed, 40)
    relays, names = [Relay(run.pair.port) for _ in range(4)], [f"stalled {n}" for n in range(4)]
    for number, relay in enumerate(relays):
        run.begin(f"before {number}", relay)
        assert run.until(f"before {number}")
    run.late.stalled, run.late_requests = True, tuple(names)
    for name, relay in zip(names, relays, strict=True):
        relay.cut.set()
        run.begin(name, relay)
    run.worker.kv_recv_thread.request_queue.join()
    run.late.stalled = False
    run.begin("refused")
    found = {"refused ends": run.until("refused"), "refused right": run.ended.get("refused")}
    found["kept"] = sum(name in run.ended for name in names)
    found["hurt"] = run.let_go()
    for relay in relays:
        relay.cut.clear()
    found["ended"] = run.until(*names, seconds=30)
    run.begin("after")
    found["after"] = run.until("after") and run.ended["after"]
    found["wrong"] = run.wrong
    return found

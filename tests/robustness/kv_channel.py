"""ZMQ's ROUTER, DEALER and monitor sockets over a network that a test decides.

Messages of a connection are lost, doubled, delayed (and so overtaken), changed; addresses are cut
off; processes end. What a TCP connection cannot do, a peer that is wrong or hostile can.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

LATENCY_S = 0.001
RECONNECT_S = 0.1
# A change of one message: its frames -> the frames that arrive instead.
Change = Callable[[list[bytes]], list[bytes]]


@dataclass
class Fate:
    """What becomes of one message: when its copies arrive, and as what."""

    delays: tuple[float, ...] = (0.0,)
    change: Change | None = None
    # A change that only who has heard the peer before can tell from the truth: before that the
    # message arrives as it is.
    late: bool = False


class Process:
    """What ends at once: its sockets say and hear nothing from then on."""

    def __init__(self, name: str) -> None:
        self.name, self.alive = name, True


class Network:
    """Addresses, connections, and what is done to the messages of each direction.

    Attributes:
        fates: Direction (`ask`: to a listener, `answer`: from it) -> of the next messages.
        cut: Addresses that nothing reaches and nothing comes from.
        seen: Called with (direction, address, frames) for each message that is delivered.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.fates: dict[str, deque[Fate]] = {"ask": deque(), "answer": deque()}
        self.cut: set[str] = set()
        self.listeners: dict[str, Router] = {}
        self.dealers: set[Dealer] = set()
        self.seen: Callable[[str, str, list[bytes]], None] = lambda *_: None
        self.delivered = 0
        self.ports = itertools.count(20_000)
        self.identities = itertools.count(1)

    def fate(self, direction: str) -> Fate:
        """Of the next message."""
        waiting = self.fates[direction]
        return waiting.popleft() if waiting else Fate()

    def reachable(self, address: str) -> bool:
        """Whether a new connection would come about."""
        listener = self.listeners.get(address)
        return listener is not None and listener.process.alive and address not in self.cut

    def accepts(self, address: str) -> bool | None:
        """Whether a host accepts a connection, or refuses it; None if it cannot be reached."""
        return None if address in self.cut else self.reachable(address)

    def heal(self, address: str) -> None:
        """What was cut off is reachable again, and what was held back arrives."""
        self.cut.discard(address)
        for dealer in list(self.dealers):
            if dealer.wire is not None and dealer.wire.address == address:
                dealer.wire.release()

    def end(self, process: Process) -> None:
        """A process ends: its kernel closes its connections, and the peers learn of it."""
        process.alive = False
        for address, listener in list(self.listeners.items()):
            if listener.process is process:
                del self.listeners[address]
                listener.closed = True
        for dealer in list(self.dealers):
            if dealer.process is process:
                dealer.close()
                continue
            wire = dealer.wire
            # A cut network carries no FIN: then keepalive notices, later.
            if wire and wire.router.process is process and wire.address not in self.cut:
                self.loop.call_later(LATENCY_S, dealer.lose, wire)

    def open_sockets(self, process: Process) -> int:
        """How many a process has."""
        return sum(dealer.process is process for dealer in self.dealers)


class Context:
    """A zmq.asyncio.Context of one process."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network, self.process = network, process

    def socket(self, kind: int, *_: Any, **__: Any) -> Any:
        """A ROUTER or a DEALER."""
        if kind == zmq.ROUTER:
            return Router(self.network, self.process)
        assert kind == zmq.DEALER, f"no socket of type {kind} here"
        return Dealer(self.network, self.process)

    def get(self, option: int) -> int:
        """Any option."""
        return 65536

    def set(self, option: int, value: int) -> None:
        """Any option."""

    setsockopt = set

    def destroy(self, linger: int = 0) -> None:
        """Nothing is kept."""

    term = destroy


class _Socket:
    def __init__(self, network: Network, process: Process) -> None:
        self.network, self.process, self.closed = network, process, False
        self.options: dict[int, Any] = {}
        self._received: deque[list[bytes]] = deque()
        self._waiting: deque[asyncio.Future[list[bytes]]] = deque()

    def setsockopt(self, option: int, value: Any) -> None:
        self.options[option] = value

    set = setsockopt

    def getsockopt(self, option: int) -> Any:
        return self.options.get(option, 0)

    get = getsockopt

    def arrive(self, frames: list[bytes]) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(frames)
                return
        self._received.append(frames)

    async def recv_multipart(self, *_: Any, **__: Any) -> list[bytes]:
        if self.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        if self._received:
            return self._received.popleft()
        future = self.network.loop.create_future()
        self._waiting.append(future)
        return await future

    async def recv(self, *_: Any, **__: Any) -> bytes:
        return (await self.recv_multipart())[-1]

    def close(self, linger: int | None = None) -> None:
        self.closed = True
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()


@dataclass(eq=False)
class Wire:
    """One connection between a DEALER and a listener."""

    network: Network
    dealer: Dealer
    router: Router
    address: str
    identity: bytes
    up: bool = True
    # Whether the dealer has had an answer as it was sent.
    heard: bool = False
    last: list[bytes] = field(default_factory=list)
    held: list[tuple[str, list[bytes], Fate]] = field(default_factory=list)

    def post(self, direction: str, frames: list[bytes]) -> None:
        """Send a message on its way."""
        self._post(direction, frames, self.network.fate(direction))

    def _post(self, direction: str, frames: list[bytes], fate: Fate) -> None:
        true = True
        if fate.change is not None and (self.heard or not fate.late):
            frames = fate.change(list(frames))
            true = False
        for delay in fate.delays:
            self.network.loop.call_later(LATENCY_S + delay, self._deliver, direction, frames, true)

    def _deliver(self, direction: str, frames: list[bytes], true: bool) -> None:
        if not self.up:
            return
        if self.address in self.network.cut:
            # TCP sends it again when it can, if the connection lives until then.
            self.held.append((direction, frames, Fate()))
            return
        self.network.delivered += 1
        if direction == "ask" and not self.router.closed:
            self.network.seen(direction, self.address, frames)
            self.router.arrive([self.identity, *frames])
        elif direction == "answer" and not self.dealer.closed:
            self.network.seen(direction, self.address, frames)
            self.heard, self.last = self.heard or true, frames
            self.dealer.arrive(list(frames))

    def release(self) -> None:
        """Send what was held back."""
        held, self.held = self.held, []
        for direction, frames, fate in held:
            self._post(direction, frames, fate)


class Router(_Socket):
    """A listener's socket; what it says to a connection that is gone is lost, as ZMQ has it."""

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__(network, process)
        self.address = ""
        self.wires: dict[bytes, Wire] = {}

    def bind_to_random_port(self, address: str, *_: Any, **__: Any) -> int:
        port = next(self.network.ports)
        self.bind(f"{address}:{port}")
        return port

    def bind(self, address: str) -> None:
        self.address = address
        self.network.listeners[address] = self

    async def send_multipart(self, frames: Any, *_: Any, **__: Any) -> None:
        identity, *rest = frames
        wire = self.wires.get(bytes(identity))
        if wire is not None and wire.up and self.process.alive:
            wire.post("answer", [bytes(frame) for frame in rest])

    def unbind(self, address: str) -> None:
        """Accept no more."""
        self.network.listeners.pop(address, None)

    def close(self, linger: int | None = None) -> None:
        super().close(linger)
        if self.network.listeners.get(self.address) is self:
            del self.network.listeners[self.address]


class Monitor:
    """What happens to a DEALER's connection, as `get_monitor_socket` tells it."""

    def __init__(self, network: Network, events: int) -> None:
        self._socket = _Socket(network, Process("monitor"))
        self.events = events

    def happen(self, event: int, endpoint: str) -> None:
        if event & self.events and not self._socket.closed:
            self._socket.arrive([struct.pack("=hi", event, 0), endpoint.encode()])

    async def recv_multipart(self, *_: Any, **__: Any) -> list[bytes]:
        return await self._socket.recv_multipart()

    def close(self, linger: int | None = None) -> None:
        self._socket.close()


class Dealer(_Socket):
    """A connection's socket: connects again by itself when its connection ended."""

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__(network, process)
        self.monitors: list[Monitor] = []
        self.wire: Wire | None = None
        self.address = ""
        self._unsent: list[list[bytes]] = []
        network.dealers.add(self)

    def get_monitor_socket(self, events: int | None = None, *_: Any) -> Monitor:
        monitor = Monitor(self.network, zmq.EVENT_ALL if events is None else events)
        self.monitors.append(monitor)
        return monitor

    def disable_monitor(self) -> None:
        self.monitors.clear()

    def connect(self, address: str) -> None:
        # As ZMQ: what is no address is refused at once.
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if not (address.startswith("tcp://") and host and port.isdigit() and 0 < int(port) < 65536):
            raise zmq.ZMQError(zmq.EINVAL)
        self.address = address
        self.network.loop.call_later(LATENCY_S, self._try)

    def _try(self) -> None:
        if self.closed or self.wire is not None:
            return
        if not self.network.reachable(self.address):
            self._happen(zmq.EVENT_CONNECT_RETRIED)
            # Seldom enough to cost a test nothing.
            self.network.loop.call_later(1.0, self._try)
            return
        router = self.network.listeners[self.address]
        identity = struct.pack(">BI", 0, next(self.network.identities))
        self.wire = router.wires[identity] = Wire(
            self.network, self, router, self.address, identity
        )
        self._happen(zmq.EVENT_CONNECTED)
        unsent, self._unsent = self._unsent, []
        for frames in unsent:
            self.wire.post("ask", frames)
        self._watch(self.wire)

    def _watch(self, wire: Wire) -> None:
        """The kernel's keepalive: the connection ends when the address was cut for so long."""
        if self.options.get(zmq.TCP_KEEPALIVE, 0) != 1:
            return
        patience = self.options.get(zmq.TCP_KEEPALIVE_IDLE, 7200) + self.options.get(
            zmq.TCP_KEEPALIVE_INTVL, 75
        ) * self.options.get(zmq.TCP_KEEPALIVE_CNT, 9)
        was_cut = 0.0

        def look() -> None:
            nonlocal was_cut
            if self.wire is not wire or self.closed:
                return
            cut = self.address in self.network.cut
            was_cut = was_cut + 1.0 if cut else 0.0
            if was_cut >= patience:
                self.lose(wire)
            else:
                self.network.loop.call_later(1.0, look)

        self.network.loop.call_later(1.0, look)

    def lose(self, wire: Wire | None) -> None:
        """The connection ends; ZMQ makes another one."""
        if wire is None or self.wire is not wire or self.closed:
            return
        wire.up, self.wire = False, None
        wire.router.wires.pop(wire.identity, None)
        self._happen(zmq.EVENT_DISCONNECTED)
        self.network.loop.call_later(RECONNECT_S, self._try)

    def _happen(self, event: int) -> None:
        for monitor in list(self.monitors):
            monitor.happen(event, self.address)

    async def send_multipart(self, frames: Any, *_: Any, **__: Any) -> None:
        if self.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        if not self.process.alive:
            return
        copied = [bytes(frame) for frame in frames]
        if self.wire is None:
            self._unsent.append(copied)
        else:
            self.wire.post("ask", copied)

    async def send(self, message: Any, *_: Any, **__: Any) -> None:
        await self.send_multipart([message])

    def close(self, linger: int | None = None) -> None:
        if self.closed:
            return
        super().close(linger)
        wire = self.wire
        self.network.dealers.discard(self)
        if wire is not None:
            # What was said is still sent (LINGER); after that the other side hears nothing more.
            self.network.loop.call_later(1.0, self._hang_up, wire)

    def _hang_up(self, wire: Wire) -> None:
        wire.router.wires.pop(wire.identity, None)

"""One connection of a decode rank to a prefill rank: what it says, and whether it is there."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from typing import Any

from ascend_patch.impl import kv_limits, kv_vllm_wire
from ascend_patch.impl.kv_vllm_wire import log

# The kernel's own probes: they are answered for a process that is merely stopped, and no longer
# for a machine that is gone. ZMQ's heartbeats would take the one for the other.
KEEPALIVE = {
    "TCP_KEEPALIVE": 1,
    "TCP_KEEPALIVE_IDLE": 10,
    "TCP_KEEPALIVE_INTVL": 5,
    "TCP_KEEPALIVE_CNT": 3,
}


# So that the last word (`cancel`) leaves.
LINGER_MS = 1000
# A message that does not leave for so long is lost, and said again like any other.
SEND_S = 2.0
PROBE_S = 5.0


class LostError(Exception):
    """The peer cannot be reached, or is gone."""


class Link:
    """A DEALER socket and its monitor; for one attempt, never reconnected.

    Raises:
        LimitError: The address is none.
        LostError: ZMQ does not take it.
    """

    def __init__(self, context: Any, address: str) -> None:
        import zmq

        kv_limits.endpoint("the address of a prefill rank", address)
        self.address, self.lost = address, asyncio.Event()
        self._next: Any = None
        self._watch: Any = None
        self._monitor: Any = None
        self.socket: Any = None
        try:
            self.socket = context.socket(zmq.DEALER)
            self._connect(zmq)
        except zmq.ContextTerminated:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise LostError(f"{address} cannot be used: {error.strerror}") from error

    def _connect(self, zmq: Any) -> None:
        options = KEEPALIVE | {
            "LINGER": LINGER_MS,
            "IPV6": 1,
            "MAXMSGSIZE": kv_limits.MAX_ANSWER,
            "RECONNECT_IVL": -1,
        }
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        ends = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
        self._monitor = self.socket.get_monitor_socket(ends)
        self._watch = asyncio.ensure_future(self._look())
        self.socket.connect(self.address)

    async def _look(self) -> None:
        await self._monitor.recv_multipart()
        self.lost.set()

    async def send(self, message: kv_vllm_wire.Ask) -> None:
        """Say it; nothing tells whether it arrives."""
        sent = asyncio.ensure_future(self.socket.send(kv_vllm_wire.encode(message)))
        if not sent.done():
            await asyncio.wait((sent,), timeout=SEND_S)
        if not sent.done():
            sent.cancel()
            return
        sent.result()

    async def answer(self, seconds: float) -> kv_vllm_wire.Answer | None:
        """The next answer that can be read; None if there is none for so long.

        Raises:
            LostError: The connection was refused, or ended.
        """
        deadline = time.monotonic() + seconds
        while True:
            frames = await self.receive(max(0.0, deadline - time.monotonic()))
            if frames is None:
                return None
            try:
                return kv_vllm_wire.decode_answer(frames[-1])
            except kv_vllm_wire.MessageError as error:
                # It says nothing, least of all that nobody writes.
                log.debug("an answer from %s is ignored: %s", self.address, error)
            if time.monotonic() >= deadline:
                return None

    async def receive(self, seconds: float) -> list[bytes] | None:
        """The same, as it came.

        Raises:
            LostError: The connection was refused, or ended.
        """
        if self._next is None:
            self._next = asyncio.ensure_future(self.socket.recv_multipart())
        gone = asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait(
                (self._next, gone), timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            gone.cancel()
        if self._next.done():
            received, self._next = self._next, None
            frames: list[bytes] = received.result()
            return frames
        if self.lost.is_set():
            raise LostError(f"the connection to {self.address} was refused or ended")
        return None

    def close(self) -> None:
        """End it; what was said is still sent."""
        for task in (self._watch, self._next):
            if task is not None:
                task.cancel()
        if self.socket is None or self.socket.closed:
            return
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close(0)
        self.socket.close()


async def is_refused(address: str) -> bool:
    """Whether the host of an address says that no process listens there.

    No answer, and no way to the host, are no such answer.
    """
    host, port = kv_limits.endpoint("the address of a prefill rank", address)
    try:
        # A name may have several addresses, and the process may listen at any.
        for one in [host] if _is_literal(host) else await _addresses(host, port):
            if not await _is_refused(one, port):
                return False
    except (OSError, asyncio.TimeoutError):
        return False
    return True


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _addresses(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    looking = loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found = await asyncio.wait_for(looking, PROBE_S)
    return [str(where[0]) for *_, where in found]


async def is_reached(address: str) -> bool:
    """Whether a process accepts connections at an address."""
    host, port = kv_limits.endpoint("the address of a prefill rank", address)
    try:
        found = [host] if _is_literal(host) else await _addresses(host, port)
        return not all([await _is_refused(one, port) for one in found])
    except (OSError, asyncio.TimeoutError):
        return False


async def _is_refused(address: str, port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), PROBE_S)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False

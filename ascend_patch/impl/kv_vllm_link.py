"""One connection of a decode rank to a prefill rank: what it says, and whether it is there."""

from __future__ import annotations

import asyncio
from typing import Any

from ascend_patch.impl import kv_vllm_wire

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


class LostError(Exception):
    """The peer cannot be reached, or is gone."""


class Link:
    """A DEALER socket and its monitor; for one attempt, never reconnected."""

    def __init__(self, context: Any, address: str) -> None:
        import zmq

        self.address, self.lost = address, asyncio.Event()
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        for name, value in KEEPALIVE.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        ends = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
        self._monitor = self.socket.get_monitor_socket(ends)
        self._watch = asyncio.ensure_future(self._look())
        self._next: Any = None
        self.socket.connect(address)

    async def _look(self) -> None:
        await self._monitor.recv_multipart()
        self.lost.set()

    async def send(self, message: kv_vllm_wire.Ask) -> None:
        """Say it; nothing tells whether it arrives."""
        await self.socket.send(kv_vllm_wire.encode(message))

    async def answer(self, seconds: float) -> kv_vllm_wire.Answer | None:
        """The next answer; None if there is none for so long.

        Raises:
            LostError: The connection was refused, or ended.
        """
        frames = await self.receive(seconds)
        return None if frames is None else kv_vllm_wire.decode_answer(frames[-1])

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
        self._watch.cancel()
        if self._next is not None:
            self._next.cancel()
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close()

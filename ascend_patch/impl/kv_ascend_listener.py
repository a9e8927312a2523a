"""vllm-ascend's MooncakeConnectorV1: the port of a prefill rank, which anybody may reach.

The release's socket takes messages of any size, queues as many answers as are not read, and hands
on whatever is decoded. Here the release's loop sees requests for metadata alone; a read that has
ended is counted by `kv_ascend_book`, and anything else is dropped and counted in the log.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from ascend_patch.impl import kv_ascend_book as books
from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl import kv_handshake, kv_limits
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# The question whether a request's blocks are there still: (HELD_MSG, request, attempt).
HELD_MSG = b"ascend_patch_held"
ACK = b"ACK"
# Seconds between two lines of the log about messages that were dropped.
EVERY_S = 10.0
# Of a connection that says nothing of itself.
HANDSHAKE_MS = 5000
FAILED = "ascend_patch_listener_failed"


def zmq_ctx(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """zmq_ctx, which opens the socket of a sending thread: with limits, and checked messages."""
    return _opened(wrapped, *args, **kwargs)


def _opened(wrapped: Wrapped, socket_type: Any, addr: str) -> Any:
    import zmq

    thread = threading.current_thread()
    sends = hasattr(thread, "task_tracker") and hasattr(thread, "side_channel_port")
    if socket_type != zmq.ROUTER or not sends:
        return wrapped(socket_type, addr)
    return _listening(thread, addr)


@contextlib.contextmanager
def _listening(thread: Any, addr: str) -> Iterator[Listener]:
    """A socket with limits: they can be set before it is bound, and not by the release's helper."""
    import zmq

    context = zmq.Context()
    try:
        socket = context.socket(zmq.ROUTER)
        limit(socket)
        socket.setsockopt(zmq.IPV6, int("[" in addr))
        try:
            socket.bind(addr)
        except zmq.ZMQError as error:
            # Who waits for the thread goes on, and says why there is no server.
            setattr(
                thread,
                FAILED,
                f"a prefill rank cannot listen at {addr}: {error}; choose another kv_port in "
                "--kv-transfer-config, or set VLLM_HOST_IP to an address of this machine",
            )
            thread.ready_event.set()
            raise
        yield Listener(socket, thread, int(addr.rpartition(":")[2]))
    finally:
        context.destroy(linger=0)


def limit(socket: Any) -> None:
    """A listening socket of which nobody can fill the memory with whole messages."""
    import zmq

    socket.setsockopt(zmq.MAXMSGSIZE, limits.MAX_MESSAGE)
    socket.setsockopt(zmq.RCVHWM, limits.MAX_QUEUED)
    socket.setsockopt(zmq.SNDHWM, limits.MAX_QUEUED)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.LINGER, 0)


def check_started(thread: Any) -> None:
    """Whether a sending thread has its port.

    Raises:
        RuntimeError: A sentence that names the address.
    """
    failed = getattr(thread, FAILED, None)
    if failed is not None:
        raise RuntimeError(failed)


class Listener:
    """A prefill rank's socket as the release's loop sees it.

    Args:
        socket: A bound ROUTER.
        thread: The release's sending thread.
        port: Where it is bound.
    """

    def __init__(self, socket: Any, thread: Any, port: int) -> None:
        host = importlib.import_module(type(thread).__module__)
        self._socket, self._port = socket, port
        self._book = books.of(thread)
        self._decode = msgspec.msgpack.Decoder(limits.Message).decode
        self._meta, self._done = host.GET_META_MSG, host.DONE_RECVING_MSG
        self._dropped, self._said = 0, -EVERY_S

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv_multipart(self) -> list[bytes]:
        """The next request for metadata; everything before it was dealt with."""
        while True:
            frames: list[bytes] = self._socket.recv_multipart()
            try:
                if self._is_for_the_release(frames):
                    return frames
            except Exception as error:
                self._drop(error)

    def _is_for_the_release(self, frames: list[bytes]) -> bool:
        payload = [frame for frame in frames[1 : limits.MAX_FRAMES] if frame]
        if len(payload) != 1 or len(frames) > limits.MAX_FRAMES:
            raise limits.LimitError(f"a message of {len(frames)} frames; one with content belongs")
        message = self._decode(payload[0])
        if message.kind == self._meta:
            return True
        if message.kind == self._done:
            reason = self._book.done(limits.done(message, self._port, kv_handshake.FIELD))
            self._answer(frames[0], ACK)
            if reason is not None:
                raise limits.LimitError(f"a read of {message.request:.100} has ended: {reason}")
        elif message.kind == HELD_MSG:
            request = kv_limits.text("the request", message.request, limits.MAX_NAME)
            attempt = kv_limits.text("the attempt", message.third, limits.MAX_ATTEMPT, least=0)
            self._answer(frames[0], self._book.held(request, attempt))
        else:
            raise limits.LimitError(f"a message of an unknown kind: {message.kind!r:.60}")
        return False

    def _answer(self, identity: bytes, said: bytes) -> None:
        import zmq

        # A ROUTER drops what a peer does not read; it never waits for one.
        self._socket.send_multipart((identity, b"", said), flags=zmq.NOBLOCK)

    def _drop(self, error: Exception) -> None:
        self._dropped += 1
        if time.monotonic() - self._said < EVERY_S:
            return
        log.warning(
            "port %d of this prefill rank: %d messages were dropped; the last one: %.200s",
            self._port,
            self._dropped,
            error,
        )
        self._said, self._dropped = time.monotonic(), 0

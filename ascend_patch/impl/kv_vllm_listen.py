"""The side channel of a prefill rank: receives messages, and stands still for none of them.

The host's own listener ends at the first message of three frames, and its twenty tasks wait for
whatever unpatched decode ranks ask for. Here every message is answered or refused at once; what
takes time is a task.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import zmq

from ascend_patch.impl import kv_limits, kv_vllm_wire
from ascend_patch.impl.kv_vllm_link import KEEPALIVE
from ascend_patch.impl.kv_vllm_wire import ERROR, INTERNAL, Answer, log, log_refusal

RESTART_S = 1.0
# Messages of unpatched decode ranks that wait for their requests.
MOST_WAITING = 1024
SENTENCES = (kv_limits.LimitError, kv_vllm_wire.MessageError)


class ListenError(RuntimeError):
    """An address cannot be listened to; the message is a sentence."""


def _address(host: str) -> str:
    return f"tcp://{kv_limits.session(host, 0).removesuffix(':0')}"


def cannot_listen(worker: Any, error: Exception) -> ListenError:
    """What to say where the worker's address cannot be bound."""
    return ListenError(
        f"The Mooncake connector's rank {worker.tp_rank} cannot listen at "
        f"{_address(worker.hostname)} ({getattr(error, 'strerror', error)}); "
        "VLLM_HOST_IP must name an address of this machine."
    )


class Listener:
    """Receives for `worker`, the host's MooncakeConnectorWorker, in its sender loop."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self._decoder = kv_vllm_wire.ask_decoder()
        self._tasks: set[Any] = set()

    async def run(self, ready: threading.Event) -> None:
        """Listen until the host's ZMQ context ends.

        Args:
            ready: Set once the rank is registered with its bootstrap server.

        Raises:
            ListenError: The rank's address cannot be bound.
        """
        sock = self._bind()
        try:
            await self.worker.register_worker_with_bootstrap()
            ready.set()
            while True:
                try:
                    await self._receive(sock)
                except zmq.ContextTerminated:
                    return
                except Exception:
                    log.exception(
                        "kv connector: the side channel of prefill rank %d failed; it goes on",
                        self.worker.tp_rank,
                    )
                    # While nobody listens, decode ranks take it for a process that has ended.
                    if sock.closed:
                        sock = await self._bind_again()
                    await asyncio.sleep(RESTART_S)
        finally:
            for task in self._tasks:
                task.cancel()
            sock.close(0)

    def _bind(self, port: int = 0) -> Any:
        host = self.worker.hostname
        sock = self.worker.async_zmq_ctx.socket(zmq.ROUTER)
        address = _address(host)
        try:
            for name, value in (KEEPALIVE | {"MAXMSGSIZE": kv_limits.MAX_MESSAGE}).items():
                sock.setsockopt(getattr(zmq, name), value)
            sock.setsockopt(zmq.IPV6, int(":" in host))
            if port:
                sock.bind(f"{address}:{port}")
            else:
                self.worker.side_channel_port = sock.bind_to_random_port(address)
        except zmq.ZMQError as error:
            sock.close(0)
            raise cannot_listen(self.worker, error) from error
        return sock

    async def _bind_again(self) -> Any:
        while True:
            try:
                return self._bind(self.worker.side_channel_port)
            except ListenError as error:
                log.error("kv connector: %s", error)
            await asyncio.sleep(RESTART_S)

    async def _receive(self, sock: Any) -> None:
        while True:
            frames = await sock.recv_multipart()
            await self._take(sock, frames)
            # A socket that always has a message returns without a turn of the loop.
            await asyncio.sleep(0)

    async def _take(self, sock: Any, frames: list[bytes]) -> None:
        identity = frames[0]
        try:
            if len(frames) != 2:
                raise kv_vllm_wire.MessageError(
                    f"the message has {len(frames) - 1} frames; 1 is read"
                )
            message = self._decoder.decode(frames[1])
            if message.ascend_patch is not None:
                await self.worker.send_kv_to_decode(identity, sock, message)
            else:
                self._wait(identity, sock, message)
        except zmq.ContextTerminated:
            raise
        except Exception as error:
            await self._fail(identity, sock, error)

    def _wait(self, identity: bytes, sock: Any, message: Any) -> None:
        """Let the host serve an unpatched decode rank: that waits until the request comes."""
        if len(self._tasks) >= MOST_WAITING:
            raise kv_limits.LimitError(
                f"{MOST_WAITING} messages of decode servers without ascend-patch wait here; ask "
                "again later"
            )
        task = asyncio.ensure_future(self._serve(identity, sock, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, identity: bytes, sock: Any, message: Any) -> None:
        try:
            await self.worker.send_kv_to_decode(identity, sock, message)
        except zmq.ContextTerminated:
            return
        except Exception as error:
            await self._fail(identity, sock, error)

    async def _fail(self, identity: bytes, sock: Any, error: Exception) -> None:
        """Say why a message is refused; what is no sentence stays in the log."""
        if isinstance(error, SENTENCES):
            sentence = str(error)
            log_refusal(f"kv push, prefill rank {self.worker.tp_rank}: refused: {sentence}")
        else:
            sentence = INTERNAL
            log.error("kv push, prefill rank %d failed", self.worker.tp_rank, exc_info=error)
        answer = kv_vllm_wire.encode(Answer(ERROR, err_msg=sentence))
        await sock.send_multipart((identity, answer))

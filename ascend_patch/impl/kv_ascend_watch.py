"""vllm-ascend's MooncakeConnectorV1: when a read that the engine gave up can write no more.

Mooncake's engine gives a read up after half a minute and keeps its connection: when a prefill rank
that had stopped goes on, the bytes are written all the same, and by then the blocks are another
request's. They are kept until that rank has answered something asked later, or its port is closed,
and what was on the way has had time to arrive.
"""

from __future__ import annotations

import importlib
import socket as sockets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl.kv_ascend_limits import MAX_METADATA
from ascend_patch.impl.kv_vllm_wire import log

Peer = tuple[str, int]

EVERY_S = 1.0
ANSWER_MS = 1000


@dataclass
class Watch:
    """Asks prefill ranks of which reads were given up, until each answers or is gone.

    Attributes:
        asks: Whether a rank, (host, port), can have no read under way any more.
        ended: Told of those.
        changed: Told after each round, in the thread that asks.
        peers: Which are asked.
        thread: Asks while there are any.
    """

    asks: Callable[[Peer], bool]
    ended: Callable[[Peer], None]
    changed: Callable[[], None] = lambda: None
    peers: set[Peer] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def add(self, peer: Peer) -> None:
        """A read from this rank was given up just now."""
        with self.lock:
            self.peers.add(peer)
            if self.thread is None:
                name = "ascend-patch-kv-watch"
                self.thread = threading.Thread(target=self._run, name=name, daemon=True)
                self.thread.start()

    def _run(self) -> None:
        while True:
            with self.lock:
                waiting = sorted(self.peers)
                if not waiting:
                    self.thread = None
            self._guarded(self.changed)
            if not waiting:
                return
            for peer in waiting:
                with self.lock:
                    # What is given up while it answers is asked for again.
                    self.peers.discard(peer)
                if self._guarded(self.asks, peer):
                    self._guarded(self.ended, peer)
                else:
                    with self.lock:
                        self.peers.add(peer)
            time.sleep(EVERY_S)

    @staticmethod
    def _guarded(called: Callable[..., Any], *given: Any) -> Any:
        """A thread that ended would leave blocks for ever."""
        try:
            return called(*given)
        except Exception:
            log.exception("asking after prefill ranks whose reads were given up")
            return None


def asker(module: str) -> Callable[[Peer], bool]:
    """What asks a prefill rank of a release.

    Args:
        module: The release's, which has its messages and addresses.
    """
    return lambda peer: _answers(importlib.import_module(module), peer) or _is_gone(peer)


def _answers(host: Any, peer: Peer) -> bool:
    import msgspec
    import zmq

    context = zmq.Context()
    try:
        socket = context.socket(zmq.REQ)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_METADATA)
        socket.connect(host.make_zmq_path("tcp", *peer))
        socket.send(msgspec.msgpack.encode((host.GET_META_MSG, "")))
        return bool(socket.poll(ANSWER_MS))
    except (zmq.ZMQError, ValueError, OSError):
        return False
    finally:
        context.destroy(linger=0)


def _is_gone(peer: Peer) -> bool:
    """Whether nobody listens there, twice: the process has ended, and its connections with it."""
    for pause in (0.0, EVERY_S):
        time.sleep(pause)
        try:
            sockets.create_connection(peer, ANSWER_MS / 1000).close()
        except ConnectionRefusedError:
            continue
        except OSError:
            return False
        return False
    return True

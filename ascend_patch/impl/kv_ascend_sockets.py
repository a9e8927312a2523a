"""vllm-ascend's MooncakeConnectorV1: the sockets that a decode rank asks its prefill ranks by."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl.kv_ascend_peers import MAX_ENGINES

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

LINGER_MS = 1000


def get_remote_socket(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """KVCacheRecvingThread._get_remote_socket: one that takes no answer of any size, and ends.

    Its context ends with it, and waits for what was not sent: to a prefill rank that is gone for
    ever, and its request with it.
    """
    return _socket(wrapped, instance, *args, **kwargs)


def _socket(wrapped: Wrapped, thread: Any, remote_host: str, remote_handshake_port: int) -> Any:
    import zmq

    found = wrapped(remote_host, remote_handshake_port)
    if found.getsockopt(zmq.MAXMSGSIZE) == limits.MAX_METADATA:
        return found
    host = importlib.import_module(type(thread).__module__)
    path = host.make_zmq_path("tcp", remote_host, remote_handshake_port)
    found.setsockopt(zmq.LINGER, LINGER_MS)
    found.setsockopt(zmq.MAXMSGSIZE, limits.MAX_METADATA)
    # What is set holds for connections that are made later.
    found.disconnect(path)
    found.connect(path)
    poller = getattr(thread, "remote_poller", None)
    if poller is not None:
        # Each one is waited for by itself, and the release's keeps those that are closed.
        with contextlib.suppress(KeyError):
            poller.unregister(found)
    with thread.remote_sockets_lock:
        while len(thread.remote_sockets) > MAX_ENGINES:
            for idle in thread.remote_sockets.pop(next(iter(thread.remote_sockets))):
                idle.close(linger=0)
    return found

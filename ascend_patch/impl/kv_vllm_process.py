"""A TCP port that refuses connections once this process has ended, and never before.

A side channel is closed by a shutdown while pushes are still under way, so that it refuses says
nothing about them. This port is open for as long as the process can write.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from ascend_patch.impl.kv_vllm_wire import log

# Linux drops what exceeds it, which is no refusal.
BACKLOG = 4096
# Between two connections: a flood of them is not one of work.
PAUSE_S, FAILED_S = 0.001, 1.0

_ports: dict[str, int] = {}
_lock = threading.Lock()


def port(host: str) -> int:
    """The port at this address, opened at the first call and closed by the end of the process.

    Raises:
        OSError: The address cannot be bound.
    """
    with _lock:
        if host not in _ports:
            _ports[host] = _open(host)
        return _ports[host]


def _open(host: str) -> int:
    family, kind, protocol, _, where = socket.getaddrinfo(
        host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.bind(where)
        found.listen(BACKLOG)
        number = int(found.getsockname()[1])
        # A descriptor that no object owns: no clean-up closes it, at the interpreter's end neither.
        # (Like every one of Python's it is closed by exec.)
        os.dup(found.fileno())
    except OSError:
        found.close()
        raise
    threading.Thread(
        target=_accept, args=(found,), name="ascend-patch-kv-process", daemon=True
    ).start()
    return number


def _accept(listening: socket.socket) -> None:
    """Close what connects, so that it does not fill the queue of connections."""
    while True:
        try:
            listening.accept()[0].close()
        except OSError as error:
            # Too many open files, or a connection that ended meanwhile: the port stays open.
            log.debug("kv connector: a connection to the port of this process: %s", error)
            time.sleep(FAILED_S)
        time.sleep(PAUSE_S)

"""The transfer engine of these tests' ranks; it is there before the release asks for one."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import socket
import sys
import time
import types
from typing import Any, ClassVar

HOST = "127.0.0.1"


class Engine:
    """Mooncake's engine: reads of this process's memory. `codes` answers instead of reading.

    Where regions are `registered`, (address, bytes), nothing else is read.
    """

    codes: ClassVar[list[int]] = []
    reads = 0
    registered: ClassVar[list[tuple[int, int]]] = []

    def initialize(self, *_: Any) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 1

    def register_memory(self, *_: Any) -> int:
        return 0

    def batch_transfer_sync_read(self, _: str, local: list, remote: list, sizes: list) -> int:
        Engine.reads += 1
        if Engine.codes:
            return Engine.codes.pop(0)
        for source, size in zip(remote, sizes, strict=True):
            if Engine.registered and not any(
                first <= source <= first + length - size for first, length in Engine.registered
            ):
                return -1
        for target, source, size in zip(local, remote, sizes, strict=True):
            ctypes.memmove(target, source, size)
        return 0


if os.environ.get("ASCEND_KV_ENGINE") == "tcp":
    engine = importlib.import_module("mooncake.engine")

    class Mooncake(engine.TransferEngine):
        """Mooncake's own, over TCP: the releases ask for the transport of an NPU."""

        def initialize(self, name: str, metadata: str, _: str, device: str) -> int:
            return super().initialize(name, metadata, "tcp", device)

    engine.TransferEngine = Mooncake
else:
    package, engine = types.ModuleType("mooncake"), types.ModuleType("mooncake.engine")
    engine.TransferEngine = Engine  # type: ignore[attr-defined]
    sys.modules.update({"mooncake": package, "mooncake.engine": engine})


def free_port(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(41000 + 97 * (time.time_ns() % 97), 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind((HOST, port))
            return first
    raise AssertionError("no free ports")

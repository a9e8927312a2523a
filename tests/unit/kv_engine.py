"""vLLM's connector module, and an engine that copies between tensors of this process."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector"


def connector(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the host's module, over a stub of Mooncake's engine where that is not installed."""
    import pytest

    pytest.importorskip("vllm", reason="vLLM is not installed here")
    try:
        import mooncake.engine  # noqa: F401
    except ImportError:
        package, engine = types.ModuleType("mooncake"), types.ModuleType("mooncake.engine")
        engine.TransferEngine = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mooncake", package)
        monkeypatch.setitem(sys.modules, "mooncake.engine", engine)
    return importlib.import_module(MODULE)


class Engine:
    """Copies bytes. `codes` are answers instead of copies; `hold` stops it half-way."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.hold = threading.Event()
        self.hold.set()
        self.writing = threading.Event()
        self.calls = 0
        self.ranges = 0

    def get_rpc_port(self) -> int:
        return 1

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_transfer_sync_write(
        self, session: str, local: list[int], remote: list[int], lengths: list[int]
    ) -> int:
        self.calls += 1
        self.ranges += len(lengths)
        if self.codes:
            return self.codes.pop(0)
        half = len(local) // 2
        for number, (source, target, length) in enumerate(zip(local, remote, lengths, strict=True)):
            if number == half:
                self.writing.set()
                assert self.hold.wait(20)
            ctypes.memmove(target, source, length)
        return 0

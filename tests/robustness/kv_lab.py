"""Fixtures of the connector's hostile tests: the host's module on a virtual clock, and its log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))


class Lines(logging.Handler):
    """What vLLM and the shim log. Tracebacks are kept apart: a peer must not cause one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []
        self.tracebacks: list[str] = []
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        if record.exc_info and record.exc_info[1] is not None:
            self.tracebacks.append(self.format(record))
        # Floods log much; the last lines tell enough.
        self.sentences.append(record.getMessage())
        del self.sentences[:-200]


class Only(list[Any]):
    """Handlers that pytest adds none to: it would keep every record of a flood."""

    def append(self, handler: Any) -> None:
        pass


@dataclass
class Lab:
    """The host's connector module, the clock that its modules have, and what was logged."""

    host: Any
    clock: Any
    lines: Lines = field(default_factory=Lines)


@pytest.fixture
def kv_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What vLLM and the shim log, instead of on the terminal."""
    # It sets its logger up when it is imported.
    pytest.importorskip("vllm.logger", reason="vLLM is not installed here")
    lines, logger = Lines(), logging.getLogger("vllm")
    monkeypatch.setattr(logger, "handlers", Only([lines]))
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield lines
    logger.setLevel(level)


@pytest.fixture
def kv_lab(monkeypatch: pytest.MonkeyPatch, kv_log: Lines) -> Iterator[Lab]:
    """vLLM's connector, the shim and kv_ranks on a virtual clock; few records are remembered."""
    pytest.importorskip("torch", reason="torch is not installed here")
    import kv_engine

    host = kv_engine.connector(monkeypatch)
    import kv_ranks
    import torch
    from kv_clock import virtual_time
    from kv_simulation import EXPIRE_S

    from ascend_patch.impl import kv_vllm_send

    monkeypatch.setenv("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", str(EXPIRE_S))
    # As many as a test exhausts in a step.
    monkeypatch.setattr(kv_vllm_send, "REMEMBERED", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with virtual_time(host, kv_ranks) as clock:
        yield Lab(host, clock, kv_log)
    torch.set_num_threads(threads)

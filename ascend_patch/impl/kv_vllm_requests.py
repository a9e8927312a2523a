"""What a prefill rank knows of the requests that it pushes, and of who asked for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl.kv_vllm_wire import READY


class PushError(Exception):
    """A request that is not pushed; `again` if asking again may help."""

    def __init__(self, sentence: str, *, again: bool = False) -> None:
        super().__init__(sentence)
        self.again = again


@dataclass
class Job:
    """One attempt of a decode rank."""

    epoch: str
    identity: bytes
    socket: Any
    ask: Any
    state: str = ""
    told: Any = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    task: Any = None
    cancelled: bool = False

    @property
    def writing(self) -> bool:
        """Whether bytes may be on their way."""
        return self.state == READY and self.go.is_set()

    def stop(self, *, last: bool) -> None:
        """Give it up, unless it writes: then its end is waited for.

        Args:
            last: Its decode rank asks no more.
        """
        self.cancelled = last
        if self.task is not None and not self.writing:
            self.task.cancel()


@dataclass
class Record:
    """What became of a request.

    Attributes:
        puller: The decode engine that it belongs to.
        expected: The decode ranks that are heard of before its blocks are freed.
        served: Those that were: rank -> whether they were pushed to (or gave up).
        known: The host has had it.
        gone: Why its blocks are no longer there; empty while they are.
        jobs: The newest attempt of each decode rank.
    """

    puller: str = ""
    expected: tuple[int, ...] = ()
    served: dict[int, bool] = field(default_factory=dict)
    gone: str = ""
    known: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)

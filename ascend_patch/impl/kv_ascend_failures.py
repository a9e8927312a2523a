"""What a decode rank of vllm-ascend did not get, and when its scheduler may hear of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

NAME = "ascend_patch_failures"
# What is still in a socket, or in a transfer engine's queue, when a batch has failed.
SETTLE_S = 2.0


@dataclass
class Failures:
    """Requests of one receiving thread whose pulls failed.

    Their blocks are reported together with the end of the request, and not before: a scheduler
    that fails a request gives its blocks to others at once, and other pulls of it may be writing.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    blocks: dict[str, set[int]] = field(default_factory=dict)
    settled: dict[str, float] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    invalid: set[int] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)

    def add(self, request: str, blocks: Any, *, settle_s: float = SETTLE_S) -> None:
        """A pull of a request failed; `settle_s` is how long something may still be written."""
        with self.lock:
            self.blocks.setdefault(request, set()).update(blocks)
            self.settled[request] = time.monotonic() + settle_s

    def failed(self, request: str) -> bool:
        """Whether one of its pulls did."""
        with self.lock:
            return request in self.blocks

    def release(self, finished: set[str]) -> set[str]:
        """Of requests that the release calls finished those that are; the others come later.

        The blocks of those that failed are then `invalid`.
        """
        with self.lock:
            self.held |= finished & self.blocks.keys()
            now = time.monotonic()
            due = {request for request in self.held if self.settled[request] <= now}
            for request in due:
                self.invalid |= self.blocks.pop(request)
                del self.settled[request]
            self.held -= due
            self.ended |= due
            return (finished - self.held) | due

    def take_invalid(self) -> set[int]:
        """Blocks that were not loaded, each reported once."""
        with self.lock:
            found, self.invalid = self.invalid, set()
            self.ended.clear()
            return found

    def take_ended(self) -> set[str]:
        """The same as requests, where blocks cannot be reported."""
        with self.lock:
            found, self.ended = self.ended, set()
            self.invalid.clear()
            return found


def of(thread: Any) -> Failures:
    """Of a receiving thread. Made before it starts to pull."""
    found: Failures = thread.__dict__.setdefault(NAME, Failures())
    return found

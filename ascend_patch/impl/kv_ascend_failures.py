"""What a decode rank of vllm-ascend did not get, and when its scheduler may hear of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl import kv_ascend_watch as watches

NAME = "ascend_patch_failures"
# What is still in a socket, or in a transfer engine's queue, when a batch has failed.
SETTLE_S = 2.0
# A request whose writer is not known to have ended fails after so long; its blocks are kept.
WAITS_S = 5.0
# In the status of a process, as vLLM's own connector has it.
FACT = "kv_quarantine"


@dataclass
class Failures:
    """Requests of one receiving thread whose pulls failed.

    Their blocks are reported together with the end of the request, and not before: a scheduler
    that fails a request gives its blocks to others at once, and other pulls of it may be writing.
    Where the writer lives on (`kv_ascend_watch`) the blocks are reported after WAITS_S, so that the
    request can fail, and the end of the request, which frees them, when it does not any more.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    blocks: dict[str, set[int]] = field(default_factory=dict)
    settled: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    invalid: set[int] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    # Request -> prefill ranks whose reads were given up and may be under way.
    writers: dict[str, set[watches.Peer]] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def add(
        self,
        request: str,
        blocks: Any,
        *,
        settle_s: float = SETTLE_S,
        writer: watches.Peer | None = None,
    ) -> None:
        """A pull of a request failed.

        Args:
            settle_s: How long something may still be written.
            writer: The prefill rank of a read that was given up; it writes until `wrote`.
        """
        with self.lock:
            self.blocks.setdefault(request, set()).update(blocks)
            now = time.monotonic()
            self.began.setdefault(request, now)
            self.settled[request] = max(self.settled.get(request, 0.0), now + settle_s)
            if writer is not None:
                self.writers.setdefault(request, set()).add(writer)

    def wrote(self, writer: watches.Peer) -> None:
        """Reads from a prefill rank that were given up can write no more, but for what has come."""
        with self.lock:
            for request in [name for name, ranks in self.writers.items() if writer in ranks]:
                self.writers[request].discard(writer)
                if not self.writers[request]:
                    del self.writers[request]
                settled = time.monotonic() + SETTLE_S
                self.settled[request] = max(self.settled.get(request, 0.0), settled)

    def failed(self, request: str) -> bool:
        """Whether one of its pulls did."""
        with self.lock:
            return request in self.blocks

    def kept(self) -> tuple[int, int]:
        """Requests and blocks that are kept for writers that may live on."""
        with self.lock:
            return len(self.writers), sum(len(self.blocks[name]) for name in self.writers)

    def snapshot(self, limit: int) -> dict[str, Any]:
        """For the status: what is kept, since when (seconds of Unix), and how much may be."""
        requests, blocks = self.kept()
        with self.lock:
            since = min((self.began[name] for name in self.writers), default=None)
        ago = None if since is None else time.time() - (time.monotonic() - since)
        return {"blocks": blocks, "requests": requests, "since": ago, "limit": limit}

    def release(self, finished: set[str]) -> set[str]:
        """Of requests that the release calls finished those that are; the others come later.

        The blocks of those that failed are then `invalid`.
        """
        with self.lock:
            self.held |= finished & self.blocks.keys()
            now = time.monotonic()
            due = {
                request
                for request in self.held
                if self.settled[request] <= now and request not in self.writers
            }
            for request in due:
                found = self.blocks.pop(request)
                if request not in self.reported:
                    self.invalid |= found
                self.reported.discard(request)
                del self.settled[request], self.began[request]
            for request in self.writers.keys() - self.reported:
                if now - self.began[request] > WAITS_S:
                    self.reported.add(request)
                    self.invalid |= self.blocks[request]
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

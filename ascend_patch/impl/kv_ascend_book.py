"""vllm-ascend's MooncakeConnectorV1: which requests a prefill rank keeps, and who has read them.

The release believes each message that a read has ended: the same one twice counts as two readers,
one of an earlier attempt frees the blocks of a later one, one of a request that is still computed
ends the engine. A decode rank never hears that the blocks it read were another's by then.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl.kv_ascend_limits import Done

NAME = "ascend_patch_book"
# Ended reads that came before the scheduler said that their request is to be kept. One that is
# forgotten frees nothing: its blocks expire.
EARLY = 1024
# Answers to the question whether a request's blocks are there.
HELD, WAIT, GONE = b"ascend_patch_held", b"ascend_patch_wait", b"ascend_patch_gone"


@dataclass
class Readers:
    """Decode ranks that have ended their reads of a request."""

    names: set[str] = field(default_factory=set)
    unnamed: int = 0
    needed: int = 1


@dataclass
class Book:
    """Of a sending thread.

    Attributes:
        tracker: The release's.
        attempts: What the scheduler drew for each request that is kept.
        readers: Of those that are kept, and have been read.
        early: Reads that ended before their request was announced, oldest first.
    """

    tracker: Any
    lock: Any = field(default_factory=threading.Lock)
    attempts: dict[str, str] = field(default_factory=dict)
    readers: dict[str, Readers] = field(default_factory=dict)
    early: deque[Done] = field(default_factory=lambda: deque(maxlen=EARLY))

    def kept(self, request: str) -> bool:
        """Whether the scheduler has said that decode may read it, and nobody has ended that."""
        return request in self.attempts and request in self.tracker.delayed_free_requests

    def expected(self, request: str) -> bool:
        """Whether it may be kept later: it is being computed. 0.11 does not know."""
        known = getattr(self.tracker, "reqs_to_process", None)
        return known is None or request in known

    def done(self, found: Done) -> str | None:
        """A read has ended; why that means nothing, or None."""
        with self.lock:
            if self.kept(found.request):
                return self._count(found)
            if not self.expected(found.request):
                return "no such request is kept here"
            self.early.append(found)
            return None

    def announced(self, attempts: dict[str, str], requests: Any) -> None:
        """The scheduler keeps these requests from now on.

        Args:
            attempts: What it drew for them.
            requests: All of them.
        """
        kept = self.tracker.delayed_free_requests
        with self.lock:
            for name in self.attempts.keys() - kept.keys():
                del self.attempts[name]
                self.readers.pop(name, None)
            for name in requests:
                if name in kept:
                    self.attempts[name] = attempts.get(name, "")
                    # Of a request of the same name that has expired.
                    self.readers.pop(name, None)
            waiting = list(self.early)
            self.early.clear()
            for found in waiting:
                if self.kept(found.request):
                    self._count(found)
                elif self.expected(found.request):
                    self.early.append(found)

    def held(self, request: str, attempt: str) -> bytes:
        """Whether a request's blocks are there: HELD, GONE, or WAIT: it is not known yet."""
        with self.lock:
            if self.kept(request):
                known = self.attempts.get(request, "")
                return HELD if not known or not attempt or known == attempt else GONE
            return WAIT if self.expected(request) else GONE

    def _count(self, found: Done) -> str | None:
        known = self.attempts.get(found.request, "")
        if known and found.attempt and found.attempt != known:
            return "it is of an earlier attempt"
        readers = self.readers.setdefault(found.request, Readers())
        # One that names fewer than another frees nothing sooner.
        readers.needed = max(readers.needed, found.needed)
        if not found.reader:
            readers.unnamed += 1
        else:
            readers.names.add(found.reader)
        if len(readers.names) + readers.unnamed >= readers.needed:
            del self.readers[found.request]
            self.tracker.update_done_task_count(found.request)
        return None


def of(thread: Any) -> Book:
    """Of a sending thread."""
    found: Book = thread.__dict__.setdefault(NAME, Book(thread.task_tracker))
    return found

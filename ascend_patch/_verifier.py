"""What has been compared of one patch in this process; see `_verify`."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascend_patch._verify import Verification

NEEDS_EAGER = "needs --enforce-eager"
MAX_NOTES = 5


@dataclass(frozen=True)
class Finding:
    """The largest difference of one comparison.

    Attributes:
        share: The error as a share of what is allowed; infinite where no number can say it.
        error, limit: The same in `unit`.
        where: Which result, its shape and dtype.
        wrong: Empty, or what differs, as a sentence.
    """

    share: float
    error: float
    limit: float
    unit: str
    where: str
    wrong: str = ""


class PatchVerifier:
    """What has been compared of one patch in this process.

    Attributes:
        compiled: Whether a graph was traced, or a device graph captured, with ours in it: there
            ours cannot be taken out any more.
    """

    def __init__(self, patch: str, calls: int | None, verification: Verification) -> None:
        self.patch = patch
        self.calls = calls
        self.compiled = False
        self.failed = False
        self._verification = verification
        self._started = 0
        self._compared = 0
        self._worst: Finding | None = None
        self._where = ""
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._count = verification.state.counters.counter(f"verify/{patch}")

    def due(self) -> bool:
        """Whether this call is to be compared; if so it is counted against the budget."""
        if not self._verification.in_step() or self.failed:
            return False
        with self._lock:
            if self.calls is not None and self._started >= self.calls:
                return False
            self._started += 1
            return True

    @contextlib.contextmanager
    def instead(self, stand_in: str) -> Iterator[None]:
        """In this thread, every target of the patch is its oracle, or with `original` the host's.

        For what a target calls: its oracle must not have ours in it.
        """
        before = self.stand_in
        self._thread.stand_in = stand_in
        try:
            yield
        finally:
            self._thread.stand_in = before

    @property
    def stand_in(self) -> str:
        """What this thread runs in the place of ours: empty, `oracle` or `original`."""
        found: str = getattr(self._thread, "stand_in", "")
        return found

    def compared(self, target: str, finding: Finding) -> None:
        """Take note of a comparison; one that found a difference switches the patch off.

        Raises:
            Refusal: ASCEND_PATCHES_STRICT=1 and the two differ.
        """
        with self._lock:
            self._compared += 1
            self._count()
            # What is wrong stays the worst, whatever else is found by other threads.
            is_worst = self._worst is None or finding.share > self._worst.share
            if is_worst and not self.failed:
                self._worst = finding
                self._where = f"{target}, call {self._compared}, {finding.where}"
            first_failure = bool(finding.wrong) and not self.failed
            self.failed = self.failed or bool(finding.wrong)
            call = self._compared
            done = self.calls is not None and self._started >= self.calls
        if is_worst or done:
            self._verification.changed()
        if first_failure:
            sentence = f"{target}, call {call}: {finding.wrong}"
            self._verification.differs(self, sentence)

    def not_compared(self, sentence: str) -> None:
        """A call could not be compared; each reason is kept once."""
        with self._lock:
            if sentence in self._notes or len(self._notes) >= MAX_NOTES:
                return
            self._notes.append(sentence)
        self._verification.changed()

    def as_data(self, steps: int, eager: bool | None) -> dict[str, Any]:
        """What the status file holds of this patch."""
        notes = list(self._notes)
        if steps and not self._compared and not self._notes:
            called = f"no target that can be compared was called in {steps} step{'s' * (steps > 1)}"
            notes.append(NEEDS_EAGER if eager is False or self.compiled else called)
        worst = self._worst
        return {
            "calls": self.calls,
            "compared": self._compared,
            # JSON has no infinity; what is that far off is in the patch's reason.
            "error": worst.error if worst and math.isfinite(worst.error) else None,
            "limit": worst.limit if worst else None,
            "unit": worst.unit if worst else "",
            "where": self._where,
            "notes": notes,
        }

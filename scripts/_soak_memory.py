"""Watches the resident memory of a server's processes, and says whether it grows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
PERIOD = 1.0
FEWEST = 8
# Of the second half of a run, whatever its length: what allocators keep back and give back makes
# of a process that does not grow. A longer run finds smaller leaks.
TOLERANCE = 8 * MIB

Sample = tuple[float, int]


@dataclass(frozen=True)
class Growth:
    """One process over a run.

    Attributes:
        first, last: Resident bytes at the beginning and at the end.
        slope: Bytes a second, fitted over the second half.
        grown: Bytes over the second half, by that slope.
        seconds: The second half's length.
        tolerance: Bytes that `grown` may be.
    """

    pid: int
    name: str
    first: int
    last: int
    slope: float
    grown: float
    seconds: float
    tolerance: float

    @property
    def fine(self) -> bool:
        return self.grown <= self.tolerance


def growth_of(
    pid: int, name: str, samples: Sequence[Sample], tolerance: float = TOLERANCE
) -> Growth:
    """Return how a process grew over the second half of its samples.

    Args:
        samples: (seconds, resident bytes), in order.

    Raises:
        ValueError: They are too few to fit a line through.
    """
    middle = (samples[0][0] + samples[-1][0]) / 2 if samples else 0.0
    half = [(at, size) for at, size in samples if at >= middle]
    if len(half) < FEWEST:
        raise ValueError(
            f"{name} (process {pid}) has {len(half)} samples in the second half, and {FEWEST} are "
            "the fewest that a slope is fitted to; let it run for longer."
        )
    slope = fitted_slope(half)
    seconds = half[-1][0] - half[0][0]
    return Growth(
        pid, name, samples[0][1], samples[-1][1], slope, slope * seconds, seconds, tolerance
    )


def fitted_slope(samples: Sequence[Sample]) -> float:
    """Return the slope of the line with the least squared distance: bytes a second."""
    count = len(samples)
    mean_at = sum(at for at, _ in samples) / count
    mean_size = sum(size for _, size in samples) / count
    over = sum((at - mean_at) * (size - mean_size) for at, size in samples)
    return over / sum((at - mean_at) ** 2 for at, _ in samples)


def session_of(pid: int) -> dict[int, str]:
    """Return the processes that share the session which `pid` leads: id -> name."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:  # It has ended.
            continue
        # A name may hold spaces and brackets; what follows the last one is numbers.
        name, _, rest = text.partition("(")[2].rpartition(")")
        if int(rest.split()[3]) == pid:
            found[int(folder.name)] = name
    return found


def resident(pid: int) -> int | None:
    """Return a process's resident bytes; None where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """Samples the processes of a session until it is stopped; a context manager.

    Attributes:
        samples: Process id -> its samples.
        names: Process id -> what the system calls it.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.pid = pid
        self.samples: dict[int, list[Sample]] = {}
        self.names: dict[int, str] = {}
        self._stop_now = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()

    def run(self) -> None:
        while True:
            now = time.monotonic()
            for pid, name in session_of(self.pid).items():
                size = resident(pid)
                if size:
                    self.names[pid] = name
                    self.samples.setdefault(pid, []).append((now, size))
            if self._stop_now.wait(PERIOD):
                return

    def growths(self, roles: Mapping[int, str], tolerance: float = TOLERANCE) -> list[Growth]:
        """Return each process that lived from the middle to the end.

        Args:
            roles: Better names than the system's, by process id.
        """
        if not self.samples:
            return []
        begins = min(samples[0][0] for samples in self.samples.values())
        ends = max(samples[-1][0] for samples in self.samples.values())
        return [
            growth_of(pid, roles.get(pid, self.names[pid]), samples, tolerance)
            for pid, samples in sorted(self.samples.items())
            if samples[0][0] <= (begins + ends) / 2 and samples[-1][0] >= ends - 3 * PERIOD
        ]

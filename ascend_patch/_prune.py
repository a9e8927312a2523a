"""Removes old runs: only names that the shim writes, by unlink and rmdir, and only for a moment.

What begins a run calls it inside `import vllm`, so it ends at a deadline however many runs there
are, and the next start goes on. A directory that holds anything else than files with the shim's own
names is left alone, and nothing is reached through a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass

from ascend_patch import _liveness
from ascend_patch._files import FILE_NAME, RUN_NAME, opened

KEEP_ENDED_RUNS = 10
SECONDS = 0.035
# Of a directory with more runs than this a part is looked at.
MOST_RUNS = 2000
# A run without a record may be one that is being made right now.
SECONDS_TO_START = 60.0
# A record goes first and the counters last: a new process with an old one's id finds its name
# taken for as long as anything of that name may still be removed.
_ORDER = ("tmp", "json", "calls")


def prune(root: int, keep: int = KEEP_ENDED_RUNS, seconds: float = SECONDS) -> None:
    """Remove runs in which no process is left, the oldest first, but for the newest `keep`.

    Args:
        root: A descriptor of the directory that holds the runs.
        keep: How many ended runs that left a record stay.
        seconds: When it stops, between two files, whatever is left.
    """
    deadline = time.monotonic() + seconds
    device = os.fstat(root).st_dev
    found = []
    with os.scandir(root) as entries:
        for entry, _ in zip(entries, range(MOST_RUNS), strict=False):
            if not RUN_NAME.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                # Another device is something that is mounted there.
                if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                    found.append((when(status.st_mtime), entry.name))
            if time.monotonic() > deadline - seconds / 2:
                break
    # The newest of a part are not older than the newest of all, so what goes may go.
    found.sort(reverse=True)
    while found and keep > 0:
        if time.monotonic() > deadline:
            return
        run = _look(root, found.pop(0)[1], deadline)
        keep -= run is not None and run.has_ended and run.has_record
    for _, name in reversed(found):
        if time.monotonic() > deadline:
            return
        run = _look(root, name, deadline)
        if run is not None and run.has_ended:
            _remove(root, run, deadline)


def when(modified: float) -> float:
    """The time by which runs are sorted: one in the future says nothing, so it is the oldest."""
    return modified if modified <= time.time() + SECONDS_TO_START else -modified


@dataclass(frozen=True)
class _Looked:
    name: str
    files: tuple[str, ...]
    has_ended: bool
    has_record: bool


def _look(root: int, name: str, deadline: float) -> _Looked | None:
    """What a run holds; None if that is not the shim's, or cannot be seen before the deadline."""
    try:
        with opened(name, root) as run:
            files = []
            with os.scandir(run) as entries:
                for entry in entries:
                    if not FILE_NAME.fullmatch(entry.name) or not entry.is_file(
                        follow_symlinks=False
                    ):
                        return None
                    files.append(entry.name)
                    if time.monotonic() > deadline:
                        return None
            record = any(file.endswith(".json") for file in files)
            age = time.time() - os.fstat(run).st_mtime
            starting = not record and 0 <= age <= SECONDS_TO_START
            ended = not starting and not _liveness.any_runs(run, files, os.geteuid())
            return _Looked(name, tuple(files), ended, record)
    except OSError:
        # It is being removed by another process, or cannot be read: it stays.
        return None


def _remove(root: int, run: _Looked, deadline: float) -> None:
    with contextlib.suppress(OSError):
        with opened(run.name, root) as directory:
            for ending in _ORDER:
                for file in run.files:
                    if file.endswith(f".{ending}"):
                        if time.monotonic() > deadline:
                            return
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(file, dir_fd=directory)
        # It stays if a process has put a file there meanwhile.
        os.rmdir(run.name, dir_fd=root)

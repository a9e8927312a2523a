"""Whether the process that made a status file still runs, here or in another container."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ascend_patch import _calls
from ascend_patch._files import FILE_NAME

MAX_PID = 2**31 - 1


def any_runs(run: int, files: Iterable[str], owner: int | None) -> bool:
    """Whether a process that left one of these files still runs; see `is_running`."""
    stems = {match[1] for file in files if (match := FILE_NAME.fullmatch(file))}
    return any(is_running(run, stem, owner) for stem in stems)


def is_running(run: int, stem: str, owner: int | None) -> bool:
    """Whether the process whose files have this name still runs, here or in another container.

    Args:
        run: A descriptor of the directory.
        stem: The name of its files without their endings.
        owner: The user that the file of counters must belong to, None for anyone.
    """
    held = _calls.is_held(f"{stem}.calls", run, owner)
    if held is not None:
        return held
    match = FILE_NAME.fullmatch(f"{stem}.json")
    return match is not None and is_alive(int(match[2]), int(match[3]))


def start_time(pid: int) -> int:
    """Clock ticks after boot when the process started; 0 where the system does not tell."""
    _, ticks = _stat(pid)
    return ticks


def is_alive(pid: int, started: int) -> bool:
    """Whether the process with this id is still the one that started then.

    Args:
        pid: Its id in this pid namespace; one below 1 is none (0 is one's own process group).
        started: Its start in clock ticks after boot; 0 if that is not known.
    """
    if not 0 < pid <= MAX_PID:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if not started:
        return True
    state, ticks = _stat(pid)
    return ticks == started and state not in ("", "Z", "X")


def _stat(pid: int) -> tuple[str, int]:
    """The state of a process and its start; `"", 0` where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field, the command, may hold spaces and parentheses of its own, and the
            # kernel cuts it after 15 bytes, in the middle of a character if need be.
            fields = file.read(4096).rpartition(b")")[2].split()
        return fields[0].decode("ascii", "replace"), int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0

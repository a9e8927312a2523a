"""Reads the runs that processes left, and takes nothing in their directories for granted.

What is not as the shim writes it becomes one sentence, and hides nothing else. Files, bytes and
sentences are bounded: whoever may write there can cost a reader some seconds, and nothing more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascend_patch import _calls, _files, _liveness, _prune, _rundir, _status_schema

MAX_RUNS = 20_000
# Of runs that have ended so many are read, the newest ones.
MAX_ENDED = 100
MAX_FILES = 16_384
# Of all files together.
MAX_BYTES = 256 << 20
MAX_PROBLEMS = 50


@dataclass
class Found:
    """What was found.

    Attributes:
        runs: Per run, the newest first, its id, start (seconds since the epoch), whether a process
            is alive, the user it belongs to, and its processes with patches, targets and counts.
        problems: What could not be read, a sentence each, without control characters.
        modified: When each run was written last, by `_prune.when`.
        bytes_left: Of all files together so many may still be read.
        problems_more: How many have no sentence.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    modified: dict[str, float] = field(default_factory=dict)
    bytes_left: int = MAX_BYTES
    problems_more: int = 0

    def problem(self, path: Path | str, error: OSError | str) -> None:
        """Note what is wrong with a file or directory."""
        what = error if isinstance(error, str) else error.strerror or str(error)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(_status_schema.printable(f"{path}: {what}"))
        else:
            self.problems_more += 1


@dataclass(frozen=True)
class _RunSeen:
    name: str
    when: float
    alive: bool


def read() -> Found:
    """Every run in the directories where the shim puts them.

    Files of other users are read only below a directory that ASCEND_PATCHES_STATUS_DIR names.

    Raises:
        RunDirectoryError: ASCEND_PATCHES_STATUS_DIR names no absolute path.
    """
    found = Found()
    owner = os.geteuid() if _rundir.named() is None else None
    for path in _rundir.readable():
        read_directory(path, owner, found)
    # Of several directories. The sort is stable, so that those of one stay in order.
    found.runs.sort(key=lambda run: (run["alive"], found.modified[run["id"]]), reverse=True)
    if found.problems_more:
        found.problems.append(f"and {found.problems_more} problems more")
    return found


def read_directory(path: Path, owner: int | None, found: Found) -> None:
    """Add the runs of one directory to what was found.

    Args:
        path: The directory that holds the runs.
        owner: The user that it and all in it must belong to, None for anyone.
    """
    try:
        with _files.opened(path, owner=owner) as root:
            seen = _runs(root, path, owner, found)
            ended = 0
            for run in seen:
                ended += not run.alive
                if run.alive or ended <= MAX_ENDED:
                    _read_run(root, run, path, owner, found)
            if ended > MAX_ENDED:
                found.problem(path, f"{ended - MAX_ENDED} older runs that have ended are not read")
    except FileNotFoundError:
        return
    except PermissionError as error:
        # Another user's, below a directory that was named.
        if path.name == _rundir.own_name():
            found.problem(path, error)
    except OSError as error:
        found.problem(path, error)


def _runs(root: int, path: Path, owner: int | None, found: Found) -> list[_RunSeen]:
    """The runs, those with a living process first, then by age."""
    seen = []
    with os.scandir(root) as entries:
        names = [entry.name for entry, _ in zip(entries, range(MAX_RUNS + 1), strict=False)]
    if len(names) > MAX_RUNS:
        found.problem(path, f"it holds more than {MAX_RUNS} files; the others are not read")
    for name in names:
        if not _files.RUN_NAME.fullmatch(name):
            continue
        try:
            with _files.opened(name, root, owner) as run:
                alive = _liveness.any_runs(run, _listed(run), owner)
                seen.append(_RunSeen(name, _prune.when(os.fstat(run).st_mtime), alive))
        except FileNotFoundError:
            continue
        except OSError as error:
            found.problem(path / name, error)
    return sorted(seen, key=lambda run: (run.alive, run.when, run.name), reverse=True)


def _listed(run: int) -> list[str]:
    with os.scandir(run) as entries:
        return [entry.name for entry, _ in zip(entries, range(MAX_FILES), strict=False)]


def _read_run(root: int, seen: _RunSeen, path: Path, owner: int | None, found: Found) -> None:
    place = path / seen.name
    processes = []
    try:
        with _files.opened(seen.name, root, owner) as run:
            user = os.fstat(run).st_uid
            names = _listed(run)
            if len(names) >= MAX_FILES:
                found.problem(place, f"it holds {MAX_FILES} files or more; not all are read")
            for name in names:
                match = _files.FILE_NAME.fullmatch(name)
                if match is None or match[4] != "json":
                    continue
                process = _process(run, match[1], int(match[2]), place, owner, found)
                if process is not None:
                    processes.append(process)
    except FileNotFoundError:
        return
    except OSError as error:
        found.problem(place, error)
        return
    if processes:
        found.modified[seen.name] = seen.when
        processes.sort(key=lambda process: (process["started"], process["pid"]))
        found.runs.append(
            {
                "id": seen.name,
                "started": processes[0]["started"],
                "alive": any(process["alive"] for process in processes),
                "user": user,
                "processes": processes,
            }
        )


def _process(
    run: int, stem: str, pid: int, place: Path, owner: int | None, found: Found
) -> dict[str, Any] | None:
    name = f"{stem}.json"
    try:
        data = _content(name, run, owner, found)
        process = _status_schema.record(data, pid)
    except FileNotFoundError:
        # It is being removed.
        return None
    except _status_schema.MalformedError as error:
        found.problem(place / name, str(error))
        return None
    except OSError as error:
        found.problem(place / name, error)
        return None
    process["alive"] = _liveness.is_running(run, stem, owner)
    _count(process, _calls.read(f"{stem}.calls", run, owner, process["counters"]))
    return process


def _content(name: str, run: int, owner: int | None, found: Found) -> bytes:
    descriptor = _files.open_regular(name, run, owner)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > _files.MAX_BYTES:
            raise _status_schema.MalformedError(
                f"it has {size} bytes, more than {_files.MAX_BYTES}"
            )
        if size > found.bytes_left:
            raise _status_schema.MalformedError(
                f"it is not read, after {MAX_BYTES >> 20} MiB of other files"
            )
        data = file.read(_files.MAX_BYTES + 1)
    found.bytes_left -= len(data)
    return data


def _count(process: dict[str, Any], calls: dict[str, int]) -> None:
    """Put the counters, which are newer, into the record."""
    for patch in process["patches"]:
        for target in patch["targets"]:
            target["calls"] = calls.get(f"{patch['id']}/{target['id']}", target["calls"])
    for patch, compared in process["verification"].items():
        compared["compared"] = calls.get(f"verify/{patch}", compared["compared"])
    for field_name, prefix in (("kernels", "kernel/"), ("left_to_host", _calls.LEFT)):
        process[field_name] |= {
            name.removeprefix(prefix): value
            for name, value in calls.items()
            if name.startswith(prefix)
        }

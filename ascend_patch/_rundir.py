"""Where status files live: a directory per server start, in the user's own runtime directory."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ascend_patch import _calls

DIRECTORY_VARIABLE = "ASCEND_PATCHES_STATUS_DIR"
RUN_VARIABLE = "ASCEND_PATCHES_RUN"
KEEP_ENDED_RUNS = 1
# A run without files may be one that is being made right now.
SECONDS_TO_START = 60.0


class RunDirectoryError(OSError):
    """No directory for status files can be used; the message says which and why."""


def base() -> Path:
    """The directory that holds every run of this user; it need not exist."""
    explicit = os.environ.get(DIRECTORY_VARIABLE, "").strip()
    if explicit:
        return Path(explicit)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "").strip()
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime) / "ascend-patch"
    return Path(tempfile.gettempdir()) / f"ascend-patch-{os.getuid()}"


def enter() -> tuple[Path, bool]:
    """This process's run directory, made if need be, and whether this process began the run.

    The run's name travels in ASCEND_PATCHES_RUN, so children join the run of their parent.

    Raises:
        RunDirectoryError: It cannot be made, or belongs to somebody else.
    """
    root = base()
    _make_private(root)
    run = os.environ.get(RUN_VARIABLE, "")
    begins = run in ("", "..") or Path(run).name != run or not (root / run).is_dir()
    if begins:
        prune(root, KEEP_ENDED_RUNS)
        run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        os.environ[RUN_VARIABLE] = run
    path = root / run
    _make_private(path)
    return path, begins


def runs(root: Path) -> list[Path]:
    """The run directories, newest first."""
    try:
        found = [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (_modified(path), path.name), reverse=True)


def prune(root: Path, keep: int) -> None:
    """Remove runs in which no process is left, but for the newest `keep` of them."""
    ended = [run for run in runs(root) if _has_ended(run)]
    for run in ended[keep:]:
        shutil.rmtree(run, ignore_errors=True)


def _has_ended(run: Path) -> bool:
    found = status_files(run)
    if not found:
        return time.time() - _modified(run) > SECONDS_TO_START
    return not any(is_running(file) for file in found)


def status_files(run: Path) -> list[Path]:
    """The status files of a run, one a process."""
    return [path for path in run.glob("*.json") if _owner(path) is not None]


def is_running(file: Path) -> bool:
    """Whether the process that wrote a status file still runs, here or in another container."""
    mapped = _calls.is_mapped(file.with_suffix(".calls"))
    if mapped is not None:
        return mapped
    owner = _owner(file)
    return owner is not None and is_alive(*owner)


def _owner(file: Path) -> tuple[int, int] | None:
    pid, _, started = file.stem.partition("-")
    return (int(pid), int(started)) if pid.isdecimal() and started.isdecimal() else None


def file_stem() -> str:
    """The name of this process's files: its id and start time, since ids are used again."""
    return f"{os.getpid()}-{start_time(os.getpid())}"


def start_time(pid: int) -> int:
    """Clock ticks after boot when the process started; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The second field, the command, may hold spaces and parentheses of its own.
    return int(text.rpartition(")")[2].split()[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process with this id is still the one that started then."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    if not started:
        return True
    return start_time(pid) == started and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return text.rpartition(")")[2].split()[0] in ("Z", "X")


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be made ({error}); set {DIRECTORY_VARIABLE} to a directory of yours"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RunDirectoryError(
            f"{path} is not a directory of yours; remove it or set {DIRECTORY_VARIABLE}"
        )


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

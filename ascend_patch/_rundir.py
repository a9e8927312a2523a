"""Where status files live: a directory for each server start, in a directory of the shim's own.

That is `ascend-patch-UID`, below what ASCEND_PATCHES_STATUS_DIR names, else below the user's own
XDG_RUNTIME_DIR, else below the temporary directory. It holds a directory a run, named by the time
and the process that began it; a run holds three files a process, named by its id and its start:
`.json` the record, `.calls` the counters, `.tmp` the record while it is being written.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ascend_patch import _liveness, _prune
from ascend_patch._files import DIRECTORY_NAME, RUN_NAME, create, opened

DIRECTORY_VARIABLE = "ASCEND_PATCHES_STATUS_DIR"
RUN_VARIABLE = "ASCEND_PATCHES_RUN"
# What RUN_VARIABLE says where a process and its children leave no files: those of doctor.
NO_FILES = "none"
# Names that are taken already are followed by a number, up to this one.
MOST_OF_A_NAME = 1000
# Of a directory that holds other things too so many are looked at.
MOST_ENTRIES = 20_000
ADVICE = f"set {DIRECTORY_VARIABLE} to an absolute path below which you can write"


class RunDirectoryError(OSError):
    """No directory for status files can be used; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """The directory of one server start.

    Attributes:
        root: The directory of the shim's own that holds it.
        begins: Whether this process began it.
    """

    root: Path
    name: str
    begins: bool

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.root / self.name

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory, checked at every step: no link leads elsewhere.

        Raises:
            OSError: It is gone, or somebody has put something else in its place.
        """
        with opened(self.root) as root, opened(self.name, root) as run:
            yield run

    def make_again(self) -> None:
        """Make the directory once more after somebody has removed it, as cleaners of /tmp do.

        Raises:
            OSError: It cannot be made.
        """
        _make_root(self.root)
        with opened(self.root) as root, contextlib.suppress(FileExistsError):
            _make(self.name, root)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all: a reader sees the old one or the new one.

        Raises:
            OSError: It cannot be written; the old one is still there.
        """
        temporary = f"{name.rpartition('.')[0]}.tmp"
        with self.opened() as run:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=run)
                with open(create(temporary, run), "wb") as file:
                    file.write(data)
                os.replace(temporary, name, src_dir_fd=run, dst_dir_fd=run)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=run)
                raise


def base() -> Path:
    """The directory that holds every run which this user begins now; it need not exist.

    Raises:
        RunDirectoryError: The variable names no absolute path, or there is no place for files.
    """
    explicit = named()
    if explicit is not None:
        return explicit / own_name()
    for place in _default_places():
        if os.access(place, os.W_OK | os.X_OK):
            return place / own_name()
    tried = " nor ".join(map(str, _default_places()))
    raise RunDirectoryError(f"there is no place for status files: {tried} can be written; {ADVICE}")


def readable() -> list[Path]:
    """The directories in which runs may be found, this user's own first.

    Below a directory that was named explicitly those of other users too: a server may run as
    another user than the one who asks for its status.

    Raises:
        RunDirectoryError: The variable names no absolute path.
    """
    explicit = named()
    if explicit is None:
        return [place / own_name() for place in _default_places()]
    others = set()
    with contextlib.suppress(OSError), os.scandir(explicit) as entries:
        for entry, _ in zip(entries, range(MOST_ENTRIES), strict=False):
            if DIRECTORY_NAME.fullmatch(entry.name):
                others.add(entry.name)
    return [explicit / name for name in (own_name(), *sorted(others - {own_name()}))]


def named() -> Path | None:
    """The directory that ASCEND_PATCHES_STATUS_DIR names, if it does.

    Raises:
        RunDirectoryError: It is relative: every process would have another one.
    """
    text = os.environ.get(DIRECTORY_VARIABLE, "").strip()
    if not text:
        return None
    if not os.path.isabs(text):
        raise RunDirectoryError(
            f"{DIRECTORY_VARIABLE}={text} is a relative path, so every working directory would "
            f"get files of its own; {ADVICE}"
        )
    return Path(text)


def own_name() -> str:
    """The name of this user's directory."""
    return f"ascend-patch-{os.getuid()}"


def _default_places() -> list[Path]:
    found = []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "").strip()
    if os.path.isabs(runtime) and _owner(runtime) == os.getuid():
        # That of another user, which `su` leaves set, is removed when that user logs out.
        found.append(Path(runtime))
    # As tempfile looks for it, but for the working directory, which no reader would find.
    texts = [os.environ.get(name, "").strip() for name in ("TMPDIR", "TEMP", "TMP")]
    texts = [text for text in (*texts, "/tmp", "/var/tmp") if os.path.isabs(text)]
    return list(dict.fromkeys([*found, *map(Path, texts)]))


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except (OSError, ValueError):
        return None


def enter() -> Run | None:
    """This process's run, made if need be; None where it is to leave no files.

    The run's name travels in ASCEND_PATCHES_RUN, so children join the run of their parent. Who
    begins one removes old ones, for some milliseconds; see `_prune`.

    Raises:
        RunDirectoryError: It cannot be made, or belongs to somebody else.
    """
    name = os.environ.get(RUN_VARIABLE, "")
    if name == NO_FILES:
        return None
    path = base()
    try:
        _make_root(path)
        with opened(path) as root:
            if RUN_NAME.fullmatch(name) and _is_directory(name, root):
                return Run(path, name, begins=False)
            _prune.prune(root)
            name = _begin(root)
    except OSError as error:
        raise _unusable(path, error) from error
    os.environ[RUN_VARIABLE] = name
    return Run(path, name, begins=True)


def stems() -> Iterator[str]:
    """Names of this process's files, to be tried in turn: its id and start, which are used again.

    In two pid namespaces the same id and start may be two processes.
    """
    stem = f"{os.getpid()}-{_liveness.start_time(os.getpid())}"
    yield stem
    for number in range(2, MOST_OF_A_NAME):
        yield f"{stem}-{number}"


def examine() -> Path:
    """Where this user's runs go, found usable without making anything.

    Raises:
        RunDirectoryError: It is not usable.
    """
    path = base()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if there == path:
        try:
            with opened(path):
                pass
        except OSError as error:
            raise _unusable(path, error) from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"{path} cannot be written; {ADVICE}")
    return path


def _unusable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(f"{path} cannot be used: {error.strerror or error}; {ADVICE}")


def _make_root(path: Path) -> None:
    os.makedirs(path.parent, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    with opened(path) as root:
        mode = stat.S_IMODE(os.fstat(root).st_mode)
        # Whatever the umask took away, and whatever lets others write.
        wanted = (mode | 0o700) & ~(stat.S_IWGRP | stat.S_IWOTH)
        if mode != wanted:
            os.fchmod(root, wanted)


def _begin(root: int) -> str:
    name = first = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    for number in range(2, MOST_OF_A_NAME):
        try:
            _make(name, root)
            return name
        except FileExistsError:
            # In another pid namespace a process of the same id began in the same second.
            name = f"{first}-{number}"
    raise FileExistsError(f"there are {MOST_OF_A_NAME} runs named {first}")


def _make(name: str, root: int) -> None:
    os.mkdir(name, 0o700, dir_fd=root)
    # Whatever the umask took away.
    os.chmod(name, 0o700, dir_fd=root)


def _is_directory(name: str, root: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode)
    except OSError:
        return False

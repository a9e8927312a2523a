"""Call counters that another process can read while this one runs.

A counter is eight bytes of a small file. Where the file system keeps space that it has promised,
the file is mapped: counting costs about 0.1 us, needs no thread and no flush, and survives a crash.
Elsewhere (copy on write, network, unknown) a full disk would end the process at a write to the
mapping, so the counters are in memory, and are written at most ten times a second.

Counts are exact under the GIL for one thread at a time; two threads that count the same call at
the same moment may lose one. A mapping still ends the process (SIGBUS) where somebody truncates the
file or punches a hole into it, which only this user and root can, or where the disk fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ascend_patch import _files

SLOTS = 512
BYTES = SLOTS * 8
# Counters of what a patch leaves to the host begin so; then its id, a colon and the reason.
LEFT = "left/"
# What is mapped there has its blocks for good once they were written. Not overlay, the root of most
# containers: it does not tell what lies below.
KEEP_PROMISES = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs")
SECONDS_BETWEEN_WRITES = 0.1
# What another process reads while it asks whether this one runs.
LOCK_ATTEMPTS = 50


class Counters:
    """Counters by name, in memory until `share` puts them into a file.

    Attributes:
        kept: Where: `memory`, `mapped`, or `written`.
        file_system: The type of the file's.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Start again from zero in memory of our own: a forked child counts for itself."""
        self.kept = "memory"
        self.file_system = ""
        self._lock = threading.Lock()
        self._cells = memoryview(bytearray(BYTES)).cast("Q")
        self._file: _Written | None = None
        self._due = 0.0

    def share(self, path: Path) -> None:
        """Move the counters into a file of that name; see `share_in`."""
        with _files.opened(path.parent) as directory:
            self.share_in(directory, (path.stem,), path.parent)

    def share_in(self, directory: int, stems: Iterable[str], place: Path) -> str:
        """Move the counters into a new file that others can read.

        Args:
            directory: A descriptor of where it is made.
            stems: Its name without `.calls`; the first one that is not taken.
            place: The path of the directory.

        Returns:
            The name that it got, without `.calls`.

        Raises:
            OSError: It cannot be made, or there is no space; counting goes on in memory.
        """
        stem, descriptor = _create(directory, stems)
        with open(descriptor, "r+b", buffering=0):
            try:
                _lock(descriptor)
                _reserve(descriptor)
                self.file_system = _file_system(descriptor)
                self._attach(descriptor, place / f"{stem}.calls")
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(f"{stem}.calls", dir_fd=directory)
                raise
        return stem

    def _attach(self, descriptor: int, path: Path) -> None:
        if self.file_system in KEEP_PROMISES:
            cells = memoryview(mmap.mmap(descriptor, BYTES)).cast("Q")
            cells[:] = self._cells
            self._cells = cells
            self.kept = "mapped"
        else:
            self._file = _Written(descriptor, path)
            self.kept = "written"
            self.flush()

    def flush(self) -> None:
        """Write the counters where they are not mapped."""
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES
        if self._file is not None and not self._file.write(bytes(self._cells)):
            self._file = None
            self.kept = "memory"

    def slot(self, name: str) -> int:
        """The slot of a name; names beyond the last slot share it."""
        with self._lock:
            if name not in self.names:
                self.names.append(name)
        return min(self.names.index(name), SLOTS - 1)

    def counter(self, name: str) -> Callable[[], None]:
        """A function that counts one call of `name`."""
        slot = self.slot(name)

        def count() -> None:
            self._cells[slot] += 1
            if self._file is not None and time.monotonic() >= self._due:
                self.flush()

        return count

    def value(self, name: str) -> int:
        """How often `name` was counted."""
        return self._cells[self.slot(name)] if name in self.names else 0


class _Written:
    """A file that is opened for each write: a descriptor that is kept may become another file's.

    Daemons close whatever is open. A mapping that nobody touches holds the lock.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._path = path
        self._identity = _identity(descriptor)
        self._mapping: mmap.mmap | None = None
        self._descriptor = -1
        try:
            self._mapping = mmap.mmap(descriptor, BYTES, prot=mmap.PROT_READ)
        except OSError:
            # This file system maps nothing; while a descriptor is open the lock is held.
            self._descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            if self._descriptor >= 0 and _identity(self._descriptor) == self._identity:
                os.close(self._descriptor)

    def write(self, data: bytes) -> bool:
        """Whether it could be written."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                same = _identity(descriptor) == self._identity
                return same and os.pwrite(descriptor, data, 0) == len(data)
            finally:
                os.close(descriptor)
        except OSError:
            return False


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _create(directory: int, stems: Iterable[str]) -> tuple[str, int]:
    taken = ""
    for stem in stems:
        try:
            return stem, _files.create(f"{stem}.calls", directory)
        except FileExistsError:
            taken = stem
    raise FileExistsError(errno.EEXIST, f"there is a file {taken}.calls, and none can be made")


def _lock(descriptor: int) -> None:
    # For as long as it is mapped here: that is how others see that this process runs. Who asks
    # holds it for a moment.
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == LOCK_ATTEMPTS - 1:
                raise
            time.sleep(0.001)
        except OSError:
            # This file system has no locks; who asks hears the same, and goes by the process id.
            return


def _reserve(descriptor: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, BYTES)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            raise
    # Where it is emulated, or does nothing, real zeros take the space.
    if os.pwrite(descriptor, bytes(BYTES), 0) != BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _file_system(descriptor: int) -> str:
    """The type of the file system of an open file; empty where the system does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
            mount = next(line.split()[1] for line in file if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as file:
            line = next(line for line in file if line.split(None, 1)[0] == mount)
        return line.rpartition(b" - ")[2].split()[0].decode("ascii", "replace")
    except (OSError, StopIteration, IndexError):
        return ""


def is_held(name: str, directory: int, owner: int | None) -> bool | None:
    """Whether the process that made the file runs; None where that cannot be told.

    A process id says less: it is used again, and in another container it is another process.
    """
    try:
        descriptor = _files.open_regular(name, directory, owner)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def read(name: str, directory: int, owner: int | None, names: list[str]) -> dict[str, int]:
    """The counters of another process.

    Args:
        name: The file that `Counters.share_in` made, in `directory`, a descriptor.
        owner: The user that it must belong to, None for anyone.
        names: The names in slot order, as that process's status file lists them.

    Returns:
        Nothing where the file is missing, or is not as this module makes it.
    """
    try:
        descriptor = _files.open_regular(name, directory, owner)
        with open(descriptor, "rb") as file:
            data = file.read(BYTES + 1)
    except OSError:
        return {}
    if len(data) != BYTES:
        return {}
    return dict(zip(names, memoryview(data).cast("Q"), strict=False))

"""Opens the directories and files of the status, past links and whatever else may lie there."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

DIRECTORY_NAME = re.compile(r"ascend-patch-[0-9]{1,10}")
# With a number where the name was taken: in another pid namespace an id is another process.
RUN_NAME = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9]{1,10}(-[0-9]{1,4})?")
FILE_NAME = re.compile(r"(([0-9]{1,10})-([0-9]{1,20})(?:-[0-9]{1,4})?)\.(json|calls|tmp)")
# Of a record.
MAX_BYTES = 4 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A FIFO is not waited for, and a terminal does not become this process's own.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


class UntrustedError(OSError):
    """It is not what the shim would have put there; the message says what it is."""


@contextlib.contextmanager
def opened(path: Path | str, parent: int | None = None, owner: int | None = -1) -> Iterator[int]:
    """A descriptor of a directory, whose last component is no link.

    Args:
        path: Relative to `parent`, a descriptor, if that is given.
        owner: The user that it must belong to: oneself by default, None for anyone.

    Raises:
        UntrustedError: It belongs to another user.
        OSError: It is no directory, or cannot be opened.
    """
    descriptor = os.open(path, _DIRECTORY, dir_fd=parent)
    try:
        _check_owner(os.fstat(descriptor), os.geteuid() if owner == -1 else owner)
        yield descriptor
    finally:
        os.close(descriptor)


def create(name: str, directory: int) -> int:
    """A descriptor of a new file for this user alone.

    Raises:
        FileExistsError: There is one of that name, or a link.
        OSError: It cannot be made.
    """
    return os.open(name, _NEW, 0o600, dir_fd=directory)


def open_regular(name: str, directory: int, owner: int | None) -> int:
    """A descriptor for reading a regular file.

    Args:
        owner: The user that it must belong to, None for anyone.

    Raises:
        UntrustedError: It is something else, or somebody else's.
        OSError: It cannot be opened.
    """
    # Not only afterwards: merely to open some devices has an effect.
    _check_regular(os.stat(name, dir_fd=directory, follow_symlinks=False), owner)
    descriptor = os.open(name, _READ, dir_fd=directory)
    try:
        _check_regular(os.fstat(descriptor), owner)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(found: os.stat_result, owner: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = _KINDS.get(stat.S_IFMT(found.st_mode), "something")
        raise UntrustedError(f"it is {what}, and no regular file")
    _check_owner(found, owner)


def _check_owner(found: os.stat_result, owner: int | None) -> None:
    if owner is not None and found.st_uid != owner:
        raise UntrustedError(f"it belongs to user {found.st_uid}, and not to user {owner}")


_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

"""Asks a new Python process for something, whatever else that process prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What is read of the process's stderr, for the last line of it.
STDERR_BYTES = 64 * 1024
# The answer has a file of its own: packages print at start and at exit, replace sys.stdout, and
# leave children behind that hold a pipe open.
SAY = """
with open({fd}, "w", encoding="utf-8") as _file:
    __import__("json").dump(answer, _file)
"""


class NoAnswer(Exception):
    """The process did not say anything that can be read; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a process said.

    Attributes:
        value: Whatever the code left in `answer`.
        status: The exit status of the process, which is its own affair once it has answered.
    """

    value: Any
    status: int


def ask(code: str, *, environ: Mapping[str, str], seconds: float) -> Answer:
    """Run code in a new process of this interpreter.

    Args:
        code: Python source that assigns plain data to `answer`.
        environ: The whole environment of the process.
        seconds: How long it may take.

    Raises:
        NoAnswer: It did not start, ended before it had answered, or took too long.
    """
    fd, stderr = _file(), _file()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code + SAY.format(fd=fd)],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=(fd,),
            timeout=seconds,
            check=False,
        )
        text = _contents(fd, 0)
        if text:
            return Answer(json.loads(text), done.returncode)
        lines = _contents(stderr, STDERR_BYTES).decode(errors="replace").strip().splitlines()
        raise NoAnswer(lines[-1] if lines else f"it ended with exit status {done.returncode}")
    except (OSError, ValueError) as error:
        raise NoAnswer(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"no answer within {seconds:.0f} s") from error
    finally:
        os.close(fd)
        os.close(stderr)


def _file() -> int:
    """A file without a name: in memory, since there may be no directory that can be written."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ascend-patch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _contents(fd: int, last: int) -> bytes:
    """The bytes of a file, or only the last of them."""
    size = os.fstat(fd).st_size
    start = max(0, size - last) if last else 0
    return os.pread(fd, size - start, start)

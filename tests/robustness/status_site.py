"""A fake host's status directory, asked from outside; and places that need root."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
DEMO = 'patch("demo", target("vllm.ops:f", "traced", "replacements:factory"))'
# Begins a run, says so, and stays until its input ends.
SERVER = "import sys, vllm.ops\nprint('ready', flush=True)\nsys.stdin.read()\n"
DAY = 86400


def runs(host: Any) -> list[Path]:
    """The run directories, wherever below the directory that was named."""
    return sorted({file.parent for file in host.status.rglob("*.json")})


def cli(host: Any, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`ascend-patch` in the fake host's environment."""
    return ended(
        [sys.executable, "-m", "ascend_patch", *words],
        env=environment(host, FAKE_DOOR="", ASCEND_PATCHES="", **options.pop("more", {})),
        cwd=options.pop("cwd", host.folder),
        **options,
    )


def status(host: Any, *words: str, **options: Any) -> dict[str, Any]:
    """`ascend-patch status --json`."""
    done = cli(host, "status", "--json", *words, **options)
    assert done.stderr == ""
    return json.loads(done.stdout)


def environment(host: Any, **more: str | None) -> dict[str, str]:
    """The fake host's, with variables set, or taken out where they are None."""
    found = host.environment(**{name: text for name, text in more.items() if text is not None})
    return {name: text for name, text in found.items() if more.get(name, "") is not None}


def ended(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that has ended, within bounds."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        **options,
    )


def start(host: Any, code: str = "import vllm.ops", **more: str) -> str:
    """What a process printed that ended well."""
    done = ended([sys.executable, "-c", code], env=host.environment(**more), cwd=host.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def server(
    host: Any, *wrapper: str, code: str = SERVER, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported vLLM, while it runs; killed at the end."""
    child = subprocess.Popen(
        [*wrapper, sys.executable, "-c", code],
        env=host.environment(**more),
        cwd=host.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


@functools.cache
def _unshare(*options: str) -> str:
    if os.geteuid() != 0:
        return "root"
    if shutil.which("unshare") is None:
        return "unshare"
    done = subprocess.run(["unshare", *options, "true"], capture_output=True, timeout=SECONDS)
    return "" if done.returncode == 0 else "the right to make namespaces"


def needs_namespaces(*options: str) -> None:
    """Skip, naming what is missing, where `unshare` with these options does not work."""
    missing = _unshare(*options)
    if missing:
        pytest.skip(f"{missing} is missing")


def in_mounts(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A shell script with mounts of its own, which end with it."""
    needs_namespaces("-m")
    return ended(["unshare", "-m", "sh", "-ec", script], **options)


def python(code: str) -> str:
    """A shell command that runs Python source."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def make_old(path: Path, seconds: float = DAY) -> None:
    """Date a directory back."""
    then = os.stat(path).st_mtime - seconds
    os.utime(path, (then, then))

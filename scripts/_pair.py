"""Servers of one environment with the shim and without, set up alike; what the shim says of them.

For commands that compare the two: scripts/matrix and scripts/soak.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _env
import _server
from _system import SetupError

STATUS_SECONDS = 60
READY_SECONDS = 300
FINE = ("applied", "armed", "retired")
# Of one patch in several processes the first of these is what is shown.
BY_WEIGHT = ("failed", "skipped", "reverted", "applied", "armed", "retired", "superseded", "off")


@dataclass(frozen=True)
class PatchSeen:
    """One patch in all processes of a server.

    Attributes:
        state: The weightiest of its states.
        reason: Why that one.
        calls: How often the host reached what it put in place.
    """

    state: str
    reason: str
    calls: int


def make_server(
    env: _env.Environment,
    model: Path,
    folder: Path,
    *,
    patches: str | None,
    arguments: Sequence[str],
    path: Sequence[Path] = (),
    more: Mapping[str, str] | None = None,
    ready_seconds: float = READY_SECONDS,
    progress: Callable[[float, str], None] | None = None,
) -> _server.Server:
    """Return a server, not started.

    Args:
        folder: For its log and the shim's status files.
        patches: ASCEND_PATCHES; None runs one that has never seen the shim.
        path: Folders of plugins, for PYTHONPATH.
        more: Further variables of its environment.
    """
    variables = _server.inherited() | _server.base_variables() | _server.cpu_variables()
    variables |= {
        "LD_PRELOAD": env.preload,
        "PATH": f"{env.plain.parent}:{variables.get('PATH', os.defpath)}",
        "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
        # By the content of a graph, so that servers can share it.
        "TORCHINDUCTOR_CACHE_DIR": str(_env.cache_root() / "inductor"),
    }
    if patches is not None and env.drop_in:
        path = [Path(env.drop_in), *path]
    if path:
        variables["PYTHONPATH"] = ":".join(map(str, path))
    if patches is not None:
        variables["ASCEND_PATCHES"] = patches
        variables["ASCEND_PATCHES_STATUS_DIR"] = str(folder / "status")
    return _server.Server(
        env.plain if patches is None else env.python,
        str(model),
        env=variables | dict(more or {}),
        log=folder / "log.txt",
        arguments=arguments,
        ready_seconds=ready_seconds,
        progress=progress,
    )


class TooLateError(SetupError):
    """A step passed its deadline."""


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise `TooLateError` in the main thread where a step takes longer."""

    def late(*_: object) -> None:
        raise TooLateError(f"{what} did not end in {seconds:.0f} s.")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def finished(
    command: list[str], folder: Path, variables: dict[str, str], seconds: float, what: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        TooLateError: It took longer.
    """
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TooLateError(f"{what} did not end in {seconds:.0f} s.") from error


def status(server: _server.Server) -> dict[str, Any]:
    """Return the server's run of `ascend-patch status --json`, asked as a user would.

    Raises:
        SetupError: The command failed, or knows of no run.
    """
    env = {k: v for k, v in server.env.items() if k not in ("ASCEND_PATCHES", "LD_PRELOAD")}
    done = subprocess.run(
        [str(server.python), "-m", "ascend_patch", "status", "--json"],
        cwd=server.log.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=STATUS_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SetupError(f"`ascend-patch status` failed: {(done.stdout + done.stderr)[-600:]}")
    runs = json.loads(done.stdout)["runs"]
    if not runs:
        raise SetupError(f"The server left no status file; its log: {server.log}")
    run: dict[str, Any] = runs[0]
    return run


def patches_seen(run: Mapping[str, Any]) -> dict[str, PatchSeen]:
    """Return each patch of a run over its processes."""
    found: dict[str, PatchSeen] = {}
    for process in run["processes"]:
        for patch in process["patches"]:
            calls = sum(target["calls"] for target in patch["targets"])
            seen = PatchSeen(patch["state"], patch["reason"], calls)
            before = found.get(patch["id"])
            if before is not None:
                first = min(before, seen, key=lambda one: BY_WEIGHT.index(one.state))
                seen = PatchSeen(first.state, first.reason, before.calls + calls)
            found[patch["id"]] = seen
    return found


def kernel_calls(run: Mapping[str, Any]) -> dict[str, int]:
    """Return how often each of our kernels ran, over all processes."""
    found: dict[str, int] = {}
    for process in run["processes"]:
        for name, calls in process["kernels"].items():
            found[name] = found.get(name, 0) + calls
    return found


def faults(run: Mapping[str, Any], fine: Sequence[str] = FINE) -> list[str]:
    """Return what should not be in a run: recorded problems, and states other than those."""
    found = []
    for process in run["processes"]:
        who = f"{process['role']} (process {process['pid']})"
        found += [f"{who}: {problem}" for problem in process["problems"]]
        found += [
            f"{who}: {patch['id']} is {patch['state']}: {patch['reason']}"
            for patch in process["patches"]
            if patch["state"] not in fine
        ]
    return found


def commit() -> str:
    """Return the short commit of the checkout; with a + where what servers run differs from it."""
    git = ["git", "-C", str(_env.CHECKOUT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *_env.SHIM_SOURCES],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + "+" * bool(changed.stdout.strip())


def today() -> str:
    """Return the date, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())

"""What happened in this process, and the status file that says so to others.

States of a patch: `off` (not selected), `armed` (waits for its modules), `applied`, `retired`
(this release needs it no more), `superseded` (another host is active), `skipped` (why), `failed`
(why; rolled back), `reverted` (taken back on request).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ascend_patch import __version__, _bootstrap, _peers, _rundir
from ascend_patch._calls import LEFT, Counters
from ascend_patch._guard import contained

UNAPPLIED = ("skipped", "failed")


@dataclass
class TargetState:
    """One target: `armed`, `applied`, `reverted`, `failed`, or `hidden` by somebody; and why."""

    id: str
    seam: str
    state: str
    reason: str = ""
    calls: int = 0


@dataclass
class PatchState:
    """One patch, its state as a sentence, and its targets in this process."""

    id: str
    version: str
    state: str
    reason: str
    by_name: bool = False
    targets: list[TargetState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def target(self, name: str) -> TargetState:
        """The target with this id."""
        return next(target for target in self.targets if target.id == name)


class ProcessState:
    """Everything that `status` shows of one process."""

    def __init__(self) -> None:
        self.patches: dict[str, PatchState] = {}
        self.facts: dict[str, Any] = {}
        self.problems: list[str] = []
        self.counters = Counters()
        self.begins_run = False
        # Of the patches that ASCEND_PATCHES_VERIFY names; see `_verify.Verification`.
        self.verification: Callable[[], dict[str, Any]] = dict
        # Of the patches that were tested when a model was loaded; see `_selftest`.
        self.self_tests: dict[str, str] = {}
        self._directory: Path | None = None
        self._files_of = 0
        self._started = time.time()
        self._lock = threading.RLock()

    @contained("the status files were made")
    def open_files(self) -> None:
        """Make this process's files; where that fails vLLM runs on and `problems` says why."""
        self._files_of = os.getpid()
        try:
            self._directory, self.begins_run = _rundir.enter()
            self.counters.share(self._directory / f"{_rundir.file_stem()}.calls")
        except OSError as error:
            self._directory = None
            self._problem(f"no status file: {error}")

    @contained("the process forked")
    def after_fork(self) -> None:
        """A forked child counts its own calls, and has files of its own once it writes.

        It writes nothing here: most forked children become another program at once (subprocess
        with a preexec_fn, as Ray starts its daemons) and would stand in the status as processes
        that they are not. Those of multiprocessing are told to write; see `Runtime.begin`.
        """
        self._lock = threading.RLock()
        self.counters.reset()
        self._started = time.time()

    def snapshot(self) -> dict[str, Any]:
        """The record as plain data."""
        for patch in self.patches.values():
            for target in patch.targets:
                target.calls = self.counters.value(f"{patch.id}/{target.id}")
        kernels = [name for name in self.counters.names if name.startswith("kernel/")]
        return {
            "ascend_patch": __version__,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "role": role(),
            "command": " ".join(" ".join(getattr(sys, "orig_argv", ())).split())[:500],
            "started": self._started,
            "door": _bootstrap.doors[0] if _bootstrap.doors else "none",
            **self.facts,
            "problems": list(self.problems),
            "peers": _peers.at_work(),
            "patches": [asdict(patch) for patch in self.patches.values()],
            "kernels": {
                name.removeprefix("kernel/"): self.counters.value(name) for name in kernels
            },
            "left_to_host": {
                name.removeprefix(LEFT): self.counters.value(name)
                for name in self.counters.names
                if name.startswith(LEFT)
            },
            "verification": self.verification(),
            "self_tests": dict(self.self_tests),
            "counters": list(self.counters.names),
        }

    @contained("the status file was written")
    def write(self) -> None:
        """Write the status file; a reader sees the old one or the new one, never half of one."""
        # Threads that import two targets at once write at once.
        with self._lock:
            if self._directory is not None and self._files_of != os.getpid():
                self.open_files()
            if self._directory is None:
                return
            path = self._directory / f"{_rundir.file_stem()}.json"
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text(json.dumps(self.snapshot(), indent=1), encoding="utf-8")
                temporary.replace(path)
            except OSError as error:
                self._directory = None
                self._problem(f"no status file: {error}")

    @contained("the decision was announced")
    def announce(self) -> None:
        """Say on stderr what was decided: loudly what was asked for by name and will not be."""
        for patch in self.patches.values():
            if patch.by_name and patch.state in (*UNAPPLIED, "superseded"):
                _bootstrap.complain(
                    f"WARNING: patch {patch.id} was asked for and is {patch.state}: {patch.reason}"
                )
        if self.begins_run and self.facts:
            facts = self.facts
            found = ", ".join(f"{p.id} {p.state}" for p in self.patches.values())
            version = facts["versions"].get(facts["host"], "unknown")
            _bootstrap.complain(
                f"{__version__}, host {facts['host']} {version}, device {facts['device']} "
                f"({facts['device_reason']}): {found or 'no patch selected'}"
            )

    def _problem(self, what: str) -> None:
        if what not in self.problems:
            self.problems.append(what)
            _bootstrap.complain(what)


def role() -> str:
    """What vLLM calls this process: `EngineCore`, `VllmWorker-0`, or `front end`."""
    process = sys.modules.get("multiprocessing.process")
    name: str = process.current_process().name if process is not None else "MainProcess"
    if name == "MainProcess":
        return (
            "ray worker"
            if "ray" in sys.modules and "default_worker.py" in "".join(sys.argv[:1])
            else "front end"
        )
    return name

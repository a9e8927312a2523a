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
from multiprocessing.util import Finalize
from typing import Any

from ascend_patch import __version__, _bootstrap, _peers, _rundir
from ascend_patch._calls import LEFT, Counters
from ascend_patch._files import MAX_BYTES
from ascend_patch._guard import contained

UNAPPLIED = ("skipped", "failed")
# Of the record; a reader says so of a later one.
FORMAT = 1
MAX_PROBLEMS = 100
MAX_COMMAND = 500
MAX_ROLE = 100
MAX_CUT = 1000


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
        self._run: _rundir.Run | None = None
        self._stem = ""
        self._files_of = 0
        self._started = time.time()
        self._ended: float | None = None
        self._at_exit: Finalize | None = None
        self._lock = threading.RLock()

    @contained("the status files were made")
    def open_files(self) -> None:
        """Make this process's files; where that fails vLLM runs on and `problems` says why."""
        self._files_of = os.getpid()
        try:
            self._run = _rundir.enter()
            if self._run is None:
                return
            self.begins_run = self._run.begins
            try:
                self._make_files(self._run)
            except FileNotFoundError:
                # Another process has removed it as a run that had ended.
                self._run.make_again()
                self._make_files(self._run)
        except (OSError, ValueError) as error:
            where = "" if self._run is None else f"{self._run.path}: "
            self._run = None
            self._problem(f"no status file: {where}{getattr(error, 'strerror', None) or error}")

    def _make_files(self, run: _rundir.Run) -> None:
        with run.opened() as directory:
            self._stem = self.counters.share_in(directory, _rundir.stems(), run.path)

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
        self._ended = None
        self._at_exit = None

    def snapshot(self) -> dict[str, Any]:
        """The record as plain data."""
        for patch in self.patches.values():
            for target in patch.targets:
                target.calls = self.counters.value(f"{patch.id}/{target.id}")
        kernels = [name for name in self.counters.names if name.startswith("kernel/")]
        command: list[str] = getattr(sys, "orig_argv", None) or getattr(sys, "argv", [])
        counting = {"kept": self.counters.kept, "file_system": self.counters.file_system}
        problems = self.problems[:MAX_PROBLEMS]
        if len(self.problems) > MAX_PROBLEMS:
            problems.append(f"and {len(self.problems) - MAX_PROBLEMS} problems more")
        return {
            "format": FORMAT,
            "ascend_patch": __version__,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "role": role()[:MAX_ROLE],
            "command": " ".join(" ".join(command).split())[:MAX_COMMAND],
            "started": self._started,
            "begins_run": self.begins_run,
            "ended": self._ended,
            "counting": counting,
            "door": _bootstrap.doors[0] if _bootstrap.doors else "none",
            **self.facts,
            "problems": problems,
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
            if self._run is not None and self._files_of != os.getpid():
                self.open_files()
            if self._run is None:
                return
            self._watch_exit()
            self.counters.flush()
            try:
                self._replace(self._run)
            except OSError as error:
                # The next time there may be space again.
                self._problem(f"no status file: {self._run.path}: {error.strerror or error}")

    def _replace(self, run: _rundir.Run) -> None:
        found = self.snapshot()
        data = json.dumps(found, indent=1).encode()
        if len(data) > MAX_BYTES:
            # A reader refuses it; what is long is what an exception said.
            data = json.dumps(_cut(found)).encode()
        try:
            run.replace(f"{self._stem}.json", data)
        except FileNotFoundError:
            if self._ended is not None:
                # Nobody needs it any more.
                return
            run.make_again()
            self._make_files(run)
            run.replace(f"{self._stem}.json", data)

    def _watch_exit(self) -> None:
        # Not atexit, which children of multiprocessing skip. They forget what was registered
        # before their own code begins, so it is looked at each time.
        if self._at_exit is None or not self._at_exit.still_active():
            self._at_exit = Finalize(None, self._exits, exitpriority=0)

    def _exits(self) -> None:
        """The process ends by itself; one that was killed, or crashed, never gets here."""
        if self._files_of == os.getpid():
            self._ended = time.time()
            try:
                self.write()
            except Exception as error:
                # Nothing of the shim's changes how a process ends.
                _bootstrap.complain(f"the end is not recorded ({type(error).__name__}: {error})")

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


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_CUT else f"{value[:MAX_CUT]}..."
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return {k: _cut(v) for k, v in value.items()} if isinstance(value, dict) else value


def role() -> str:
    """What vLLM calls this process: `EngineCore`, `VllmWorker-0`, or `front end`."""
    process = sys.modules.get("multiprocessing.process")
    name = str(process.current_process().name) if process is not None else "MainProcess"
    if name != "MainProcess":
        return name
    in_ray = "ray" in sys.modules and "default_worker.py" in "".join(sys.argv[:1])
    return "ray worker" if in_ray else "front end"

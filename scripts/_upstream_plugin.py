"""A pytest plugin beside somebody else's tests: each test's outcome, and the calls to our code.

It imports nothing of the shim: where that is not armed there is nothing to count. The report is
JSON in the file that UPSTREAM_REPORT names, written anew after each file of tests.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# What differs from run to run and says nothing: addresses, numbers, folders.
VARIES = re.compile(r"0x[0-9a-f]+|\d+|(/[^\s/'\"]+)+/")
LONGEST = 300
# Some wait for threads of theirs that have failed.
SECONDS = 120


class Plugin:
    """One run of pytest.

    Args:
        report: The file to write.
    """

    def __init__(self, report: Path) -> None:
        self._report = report
        self._tests: dict[str, dict[str, Any]] = {}
        self._uncollected: dict[str, str] = {}
        self._before: Counter[str] = Counter()
        self._forks_write = False
        self._write(finished=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A test whose device is a parameter is given the one that there is."""
        for item in items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if str(parameters.get("device", "")).startswith("cuda"):
                parameters["device"] = "cpu"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._uncollected[report.nodeid] = f"{report.outcome}: {_reason(report)}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        self._let_forks_write()
        self._before = _calls()
        started = item.nodeid
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            reached = _calls() - self._before
            self._tests.setdefault(started, {"outcome": "none", "why": ""})["calls"] = reached
            if nextitem is None or nextitem.path != item.path:
                self._write(finished=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._tests.setdefault(report.nodeid, {"outcome": "none", "why": ""})
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xpassed" if outcome == "passed" else "xfailed"
        # The worst of set-up, call and tear-down; a call that passed is no word about the others.
        ranks = ("none", "passed", "skipped", "xpassed", "xfailed", "failed")
        if report.when == "call" or outcome != "passed":
            test["outcome"] = max(test["outcome"], outcome, key=ranks.index)
            test["why"] = test["why"] or _reason(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._write(finished=True)
        # Threads and sockets that the tests leave behind would keep the process for ever.
        os._exit(0)

    def _write(self, *, finished: bool) -> None:
        found = {
            "finished": finished,
            "tests": self._tests,
            "uncollected": self._uncollected,
            "status": _status(),
        }
        self._report.write_text(json.dumps(found, indent=1), encoding="utf-8")

    def _let_forks_write(self) -> None:
        """A child of os.fork counts for itself, and says so where it is told to write."""
        runtime = _runtime()
        if runtime is not None and not self._forks_write:
            self._forks_write = True
            os.register_at_fork(after_in_child=runtime.current().state.write)


def _keep_contexts() -> None:
    """Where a context is collected, ZeroMQ waits for ever for what threads have left open."""
    try:
        import zmq
    except ImportError:
        return
    kept: list[Any] = []
    original = zmq.Context.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kept.append(self)

    zmq.Context.__init__ = __init__


def _too_long(*_: object) -> None:
    raise TimeoutError("the test took too long")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGALRM, _too_long)
    _keep_contexts()
    for marker in ("slow", "cpu_test"):
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(Plugin(Path(os.environ["UPSTREAM_REPORT"])))


def _runtime() -> Any:
    return sys.modules.get("ascend_patch._runtime")


def _status() -> dict[str, Any]:
    runtime = _runtime()
    return runtime.current().status() if runtime is not None else {}


def _calls() -> Counter[str]:
    """How often each target and kernel of ours was called so far, in every process of this run."""
    found: Counter[str] = Counter()
    runtime = _runtime()
    if runtime is None:
        return found
    from ascend_patch import _status as status

    counters = runtime.current().state.counters
    found.update({name: counters.value(name) for name in counters.names})
    for run in status.runs():
        for process in run["processes"]:
            if process["pid"] != os.getpid():
                for patch in process["patches"]:
                    for target in patch["targets"]:
                        found[f"{patch['id']}/{target['id']}"] += target["calls"]
                for name, count in process["kernels"].items():
                    found[f"kernel/{name}"] += count
    return found


def _reason(report: Any) -> str:
    """Why a test did not pass, in one line without what varies."""
    found = report.longrepr
    if isinstance(found, tuple):
        found = found[2]
    crash = getattr(found, "reprcrash", None)
    text = str(crash.message if crash is not None else found or "")
    lines = [line for line in text.splitlines() if line.strip()]
    if crash is None and lines:
        # A failed import ends with what failed.
        lines = [line for line in lines if line.startswith("E ")][-1:] or lines
    return VARIES.sub("", lines[0])[:LONGEST] if lines else ""

"""The report of `ascend-patch status`: what the processes of each run wrote, as lines."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ascend_patch import _status_read
from ascend_patch._status_schema import printable


def runs(root: Path | None = None) -> list[dict[str, Any]]:
    """Every run that left files, newest first; see `_status_read.Found.runs`.

    Args:
        root: The directory that holds the runs; where the shim puts them by default.
    """
    if root is None:
        return _status_read.read().runs
    found = _status_read.Found()
    _status_read.read_directory(root, os.geteuid(), found)
    return found.runs


def as_text(run: dict[str, Any]) -> list[str]:
    """One run as lines of at most 100 columns, but for reasons, which are never cut.

    Control characters are escaped: another process has written them.
    """
    return [printable(line) for line in _lines(run)]


def _lines(run: dict[str, Any]) -> list[str]:
    first = run["processes"][0]
    version = first["versions"].get(first["host"], "unknown")
    of = "" if run.get("user", os.geteuid()) == os.geteuid() else f" of user {run['user']}"
    shown, helpers = _apart(run)
    lines = [
        f"run {run['id']}{of}: {'running' if run['alive'] else 'ended'}, {_since(run['started'])}",
        f"  ASCEND_PATCHES={first['selection']}, host {first['host']} {version}, "
        f"device {first['device']}",
        "",
        f"  {'process':<20} {'pid':>8}  {'patch':<18} {'state':<11} {'calls':>12}  targets",
    ]
    for process in shown:
        label = process["role"] + _how_ended(process)
        for patch in process["patches"] or [_NO_PATCH]:
            applied = sum(target["state"] == "applied" for target in patch["targets"])
            calls = sum(target["calls"] for target in patch["targets"])
            count = f"{applied} of {len(patch['targets'])} applied" if patch["targets"] else "-"
            lines.append(
                f"  {label:<20} {process['pid']:>8}  {patch['id']:<18} {patch['state']:<11} "
                f"{calls:>12}  {count}"
            )
            label = ""
        if process["kernels"]:
            kernels = ", ".join(f"{name} {count}" for name, count in process["kernels"].items())
            lines.append(f"{_ASIDE}kernels run: {kernels}")
        lines += [
            f"{_ASIDE}left to the host {_times(count)} by {reason}"
            for reason, count in process["left_to_host"].items()
        ]
        if process["peers"]:
            lines.append(f"{_ASIDE}beside it: {', '.join(process['peers'])}")
        lines += [f"{_ASIDE}self-test of {p}: {t}" for p, t in process["self_tests"].items()]
        lines += [f"{_ASIDE}{_compared(p, f)}" for p, f in process["verification"].items()]
    if any(_how_ended(process) == _KILLED for process in shown):
        lines.append("  killed: by a signal, a crash, or os._exit; it did not end by itself")
    for process in helpers:
        # Its end says what it was; its start is the path of an interpreter.
        command = process["command"][-60:]
        lines.append(f"  {process['pid']} has done its work and ended: {command}")
    lines.extend(_reasons(run))
    return lines


def _apart(run: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The processes of the server, and helpers of it that have ended.

    vLLM starts some that import it and end by themselves, to look at a model's class for example.
    They are main processes like the front end, but began no run, and it goes on without them.
    """
    helpers = [
        process
        for process in run["processes"]
        if run["alive"]
        and not process["alive"]
        and process["role"] == "front end"
        and not process["begins_run"]
        and process["ended"] is not None
    ]
    return [process for process in run["processes"] if process not in helpers], helpers


_KILLED = " (killed)"


def _how_ended(process: dict[str, Any]) -> str:
    if process["alive"]:
        return ""
    # Versions before the first format did not note it.
    return _KILLED if process["ended"] is None and process["format"] else " (ended)"


_ASIDE = " " * 33


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _compared(patch: str, found: dict[str, Any]) -> str:
    of = f" of {found['calls']}" if found["calls"] is not None else ""
    text = f"verify of {patch}: {found['compared']}{of} calls compared"
    if found["error"] is not None and found["limit"] is not None:
        text += (
            f", largest error {found['error']:.3g} {found['unit']} of {found['limit']:g} allowed "
            f"({found['where']})"
        )
    return "; ".join([text, *found["notes"]])


_NO_PATCH: dict[str, Any] = {"id": "-", "state": "-", "targets": []}


def _reasons(run: dict[str, Any]) -> list[str]:
    """Every different reason once; twelve processes rarely have twelve."""
    found: dict[str, None] = {}
    for process in run["processes"]:
        for patch in process["patches"]:
            found.setdefault(f"{patch['id']} {patch['state']}: {patch['reason']}")
            found.update((f"{patch['id']}: {note}", None) for note in patch["notes"])
            found.update(
                (f"{patch['id']}: {target['id']}: {target['reason']}", None)
                for target in patch["targets"]
                if target["reason"]
            )
        found.update((f"{process['role']}: {problem}", None) for problem in process["problems"])
        counting = process["counting"]
        if counting["kept"] == "written":
            what = counting["file_system"] or "this file system"
            found[
                f"{process['role']}: calls of the last moment may be missing: {what} keeps no "
                "space for a mapping, so they are written ten times a second"
            ] = None
    return ["", *(f"  {sentence}" for sentence in found)] if found else []


def _since(started: float) -> str:
    seconds = time.time() - started
    return f"started {_duration(seconds)} ago" if seconds > -60 else "started in the future"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

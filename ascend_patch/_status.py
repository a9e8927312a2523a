"""Reads what the processes of a run wrote, while they run or after they ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ascend_patch import _calls, _rundir


def runs(root: Path | None = None) -> list[dict[str, Any]]:
    """Every run that left files, newest first.

    Args:
        root: The directory that holds the runs; this user's own by default.

    Returns:
        Per run its id, start (seconds since the epoch), whether a process is alive, and its
        processes with their patches, targets and call counts.
    """
    found = []
    for path in _rundir.runs(_rundir.base() if root is None else root):
        processes = [process for file in path.glob("*.json") if (process := _process(file))]
        if processes:
            processes.sort(key=lambda process: process["started"])
            found.append(
                {
                    "id": path.name,
                    "started": processes[0]["started"],
                    "alive": any(process["alive"] for process in processes),
                    "processes": processes,
                }
            )
    return found


def _process(file: Path) -> dict[str, Any] | None:
    try:
        process: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Being replaced or removed right now; what it held is in the next reading.
        return None
    process["alive"] = _rundir.is_running(file)
    calls = _calls.read(file.with_suffix(".calls"), process.get("counters", []))
    for patch in process["patches"]:
        for target in patch["targets"]:
            target["calls"] = calls.get(f"{patch['id']}/{target['id']}", target["calls"])
    # Files that were written before there was either.
    for patch, found in process.setdefault("verification", {}).items():
        found["compared"] = calls.get(f"verify/{patch}", found["compared"])
    process.setdefault("self_tests", {})
    process.setdefault("peers", [])
    left = process.setdefault("left_to_host", {})
    left |= {
        name.removeprefix(_calls.LEFT): value
        for name, value in calls.items()
        if name.startswith(_calls.LEFT)
    }
    process["kernels"] |= {
        name.removeprefix("kernel/"): value
        for name, value in calls.items()
        if name.startswith("kernel/")
    }
    return process


def as_text(run: dict[str, Any]) -> list[str]:
    """One run as lines of at most 100 columns, but for reasons, which are never cut."""
    first = run["processes"][0]
    version = first.get("versions", {}).get(first.get("host", ""), "unknown")
    age = _duration(time.time() - run["started"])
    lines = [
        f"run {run['id']}: {'running' if run['alive'] else 'ended'}, started {age} ago",
        f"  ASCEND_PATCHES={first.get('selection', '?')}, host {first.get('host', '?')} {version}, "
        f"device {first.get('device', '?')}",
        "",
        f"  {'process':<20} {'pid':>8}  {'patch':<18} {'state':<11} {'calls':>12}  targets",
    ]
    for process in run["processes"]:
        label = process["role"] + ("" if process["alive"] else " (ended)")
        for patch in process["patches"] or [_NO_PATCH]:
            applied = sum(target["state"] == "applied" for target in patch["targets"])
            calls = sum(target["calls"] for target in patch["targets"])
            of = f"{applied} of {len(patch['targets'])} applied" if patch["targets"] else "-"
            lines.append(
                f"  {label:<20} {process['pid']:>8}  {patch['id']:<18} {patch['state']:<11} "
                f"{calls:>12}  {of}"
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
    lines.extend(_reasons(run))
    return lines


_ASIDE = " " * 33


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _compared(patch: str, found: dict[str, Any]) -> str:
    of = f" of {found['calls']}" if found["calls"] is not None else ""
    text = f"verify of {patch}: {found['compared']}{of} calls compared"
    if found["error"] is not None:
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
    return ["", *(f"  {sentence}" for sentence in found)] if found else []


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

"""Looks for what is wrong with an installation: the door, the host, and strangers in the house."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascend_patch import (
    __version__,
    _doors,
    _fresh_process,
    _peers,
    _plan,
    _registry,
    _rundir,
    _selection,
    _selftest,
    _verify,
    _versions,
)
from ascend_patch._doors import Finding
from ascend_patch._state import UNAPPLIED
from ascend_patch._versions import Installed

TESTED_PYTHONS = ((3, 10), (3, 12))
PROBE_SECONDS = 300
ENTRY_POINT = "ascend_patch"
PLUGINS = "loading vLLM's plugins"
# As in a server, plugins come before the modules of models.
PROBE = """
import importlib, vllm.plugins, ascend_patch
failed = {{}}
def attempt(what, call, *given):
    try:
        call(*given)
    except (Exception, SystemExit) as error:
        failed[what] = f"{{type(error).__name__}}: {{error}}"
attempt({plugins!r}, vllm.plugins.load_general_plugins)
for name in {modules!r}:
    attempt("importing " + name, importlib.import_module, name)
answer = {{**ascend_patch.status(), "failed": failed}}
"""


def examine(*, quick: bool = False) -> list[Finding]:
    """Look at everything.

    Args:
        quick: Leave out the process that imports vLLM, which takes some ten seconds.
    """
    try:
        installed = _versions.find()
    except _versions.DeviceError as error:
        return [*_interpreter(), Finding("wrong", "device", str(error))]
    findings = [
        *_interpreter(),
        *_dependencies(),
        *_selected(),
        *_doors.examine(),
        *_host(installed),
        *_patches(installed, _selection_or_none()),
        *_neighbours(),
        *_directory(),
    ]
    if not quick and "vllm" in installed.roots:
        findings.extend(_applied(installed))
    return findings


def _interpreter() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    low, high = TESTED_PYTHONS
    tested = low <= sys.version_info[:2] <= high
    extra = "" if tested else f"; tested are {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    yield Finding("ok" if tested else "note", "python", f"{version} at {sys.executable}{extra}")
    yield Finding("ok", "ascend-patch", f"{__version__} at {Path(__file__).parent}")


def _dependencies() -> Iterator[Finding]:
    for name in ("wrapt", "packaging"):
        if importlib.util.find_spec(name) is None:
            yield Finding(
                "wrong", name, f"it is missing, so nothing is patched; pip install {name}"
            )


def _selected() -> Iterator[Finding]:
    value = os.environ.get(_selection.VARIABLE)
    if _selection.is_off(value):
        yield Finding("note", _selection.VARIABLE, "unset or off: vLLM would run unpatched")
        return
    try:
        chosen = _parse(value or "")
    except _selection.SelectionError as error:
        yield Finding("wrong", _selection.VARIABLE, str(error))
        return
    yield Finding("ok", _selection.VARIABLE, f"{value}: {', '.join(chosen.ids) or 'no patch'}")
    yield from _verified(tuple(_registry.load()), chosen.ids)


def _parse(value: str) -> _selection.Selection:
    registry = _registry.load()
    in_all = tuple(patch.id for patch in registry.values() if patch.available)
    return _selection.parse(value, tuple(registry), in_all)


def _selection_or_none() -> _selection.Selection:
    """What is selected; nothing where that cannot be understood, which is said elsewhere."""
    try:
        return _parse(os.environ.get(_selection.VARIABLE, ""))
    except _selection.SelectionError:
        return _selection.Selection((), frozenset())


def _verified(known: tuple[str, ...], selected: tuple[str, ...]) -> Iterator[Finding]:
    try:
        wanted = _verify.parse(os.environ.get(_verify.VARIABLE), known, selected)
    except _verify.VerifyError as error:
        yield Finding("wrong", _verify.VARIABLE, str(error))
        return
    for name in wanted.idle:
        yield Finding("wrong", _verify.VARIABLE, _verify.idle_sentence(name))
    if wanted.calls:
        what = "every call costs two; for finding faults, not for serving"
        yield Finding("note", _verify.VARIABLE, f"{', '.join(wanted.calls)}: {what}")
    try:
        _selftest.wanted("")
    except _selftest.SelfTestError as error:
        yield Finding("wrong", _selftest.VARIABLE, str(error))


def _host(installed: Installed) -> Iterator[Finding]:
    for host in _registry.HOSTS:
        if host in installed.roots:
            version = installed.versions.get(host, "of unknown version")
            yield Finding("ok", host, f"{version} in {installed.roots[host]}")
    if "vllm" not in installed.roots:
        yield Finding("wrong", "vllm", "it is not installed in this environment")
        return
    yield Finding("ok", "host", f"{installed.host}: {installed.host_reason}")
    yield Finding("ok", "device", f"{installed.device}: {installed.device_reason}")
    if installed.host == "vllm" and "vllm_ascend" in installed.roots:
        yield Finding("note", "host", "vllm_ascend is installed, but its platform is not active")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Finding("note", "late door", f"VLLM_PLUGINS={allowed} closes it; the others suffice")


def _patches(installed: Installed, selected: _selection.Selection) -> Iterator[Finding]:
    registry = _registry.load()
    planned = _plan.plan(selected, registry, installed)
    for patch in registry.values():
        decision = planned.get(patch.id) or _plan.decide(patch, installed)
        level = "note" if decision.state in UNAPPLIED else "ok"
        text = f"{decision.state}: {decision.reason}"
        if patch.id in selected.by_name and decision.state in (*UNAPPLIED, "superseded"):
            level, text = "wrong", f"asked for by name and {text}"
        yield Finding(level, patch.id, text)


def _neighbours() -> Iterator[Finding]:
    for peer, version in _peers.installed():
        if version == peer.tested:
            yield Finding(
                "ok" if peer.fine else "note", peer.distribution, f"{version}: {peer.text}"
            )
        else:
            tested = f"tested beside {peer.tested}" if peer.tested else "never tested beside it"
            yield Finding("note", peer.distribution, f"{version}: {peer.text} ({tested})")
    for name, entries in _peers.plugins():
        what = "it runs code of its own in every vLLM process; below is what it changed of ours"
        yield Finding("note", "plugin", f"{name} ({entries}): {what}")


def _directory() -> Iterator[Finding]:
    try:
        yield Finding("ok", "status files", str(_rundir.examine()))
    except _rundir.RunDirectoryError as error:
        yield Finding("wrong", "status files", str(error))


def _applied(installed: Installed) -> Iterator[Finding]:
    """Import the targets' modules in a process of its own, as a server would, and look."""
    registry = _registry.load()
    decisions = [_plan.decide(patch, installed) for patch in registry.values()]
    modules = sorted(
        {t.module for d in decisions if d.state == "armed" and d.band for t in d.band.targets}
    )
    if not modules:
        return
    code = PROBE.format(modules=modules, plugins=PLUGINS)
    value = os.environ.get(_selection.VARIABLE)
    environment = {**os.environ, _selection.VARIABLE: "all" if _selection.is_off(value) else value}
    # It is no server, and `status` shows servers.
    environment[_rundir.RUN_VARIABLE] = _rundir.NO_FILES
    environ = {name: text for name, text in environment.items() if text is not None}
    try:
        answer = _fresh_process.ask(code, environ=environ, seconds=PROBE_SECONDS)
    except _fresh_process.NoAnswer as error:
        yield Finding("wrong", "import", f"vLLM could not be imported ({error})")
        return
    yield from _as_found(answer.value)
    if answer.status:
        what = f"the process that imported vLLM ended with exit status {answer.status} after that"
        yield Finding("note", "import", what)


def _as_found(found: dict[str, Any]) -> Iterator[Finding]:
    """What a process that imported every target says of itself."""
    for patch in found["patches"]:
        level = "wrong" if patch["state"] == "failed" else "ok"
        reason = f": {patch['reason']}" if level == "wrong" else ""
        yield Finding(level, patch["id"], f"in a process of its own: {patch['state']}{reason}")
        for target in patch["targets"]:
            if target["reason"]:
                level = "wrong" if target["state"] == "hidden" else "note"
                yield Finding(level, patch["id"], f"{target['id']}: {target['reason']}")
    for problem in found["problems"]:
        yield Finding("wrong", "import", problem)
    for what, error in found["failed"].items():
        # A module may need what this machine does without, as that of Mooncake does.
        level = "wrong" if what == PLUGINS else "note"
        yield Finding(level, "import", f"{what} failed: {error}")
    for peer in found["peers"]:
        yield Finding("note", "neighbour", f"{peer} is imported in that process")

"""Imports what the patches change, in one process for each device, for scripts/matrix."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _env
import _pair
from _disaggregated import engine_folder
from _matrix_cases import DECIDED, Result, Seen
from _system import SetupError

IN_PART = "applied in part"
IMPORT_SECONDS = 180


def run_imports(env: _env.Environment, release: str, device: str, folder: Path) -> Result:
    """Import what the patches change, for a device, in one process; nothing is run."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    found = _child(env, folder, "patched", device)
    refused, why = found["not imported"], ""
    if refused:
        # What vLLM cannot import without the shim either is no fault of the shim's.
        plain = _child(env, folder, "plain", device, refused)["not imported"]
        refused = {name: why for name, why in refused.items() if plain.get(name) != why}
        why = "; ".join(f"vLLM itself cannot import {name} here: {e}" for name, e in plain.items())
    result = Result(
        release,
        f"imports, {device}",
        "",
        _pair.today(),
        _pair.commit(),
        found["versions"],
        verdict="applied in part" if found["not imported"] else "applied",
        patches={name: _imported(patch) for name, patch in found["patches"].items()},
        why=why,
    )
    allowed = (*DECIDED, IN_PART) if found["not imported"] else DECIDED
    wrong = [
        f"{name} is {patch.state}: {patch.reason}"
        for name, patch in result.patches.items()
        # Its modules were imported, so that nothing waits for them.
        if patch.state not in allowed or patch.state == "armed"
    ]
    wrong += found["problems"]
    wrong += [f"{name} cannot be imported: {why}" for name, why in refused.items()]
    wrong += [f"{name} was not decided" for name in found["known"] if name not in result.patches]
    if wrong:
        result.verdict = "; ".join(wrong)
    result.seconds = round(time.monotonic() - began)
    return result


def _imported(patch: dict[str, Any]) -> Seen:
    whole = set(patch["targets"]) <= {"applied"}
    return Seen(
        IN_PART if patch["state"] == "applied" and not whole else patch["state"], patch["reason"]
    )


def _child(
    env: _env.Environment, folder: Path, kind: str, device: str, modules: Iterable[str] = ()
) -> dict[str, Any]:
    """Run _matrix_child.py: "patched", or "plain" with the modules that it should import."""
    out = folder / f"{kind}.json"
    plain = kind == "plain"
    # vLLM's Mooncake connectors cannot be imported without its engine.
    server = _pair.make_server(
        env,
        folder,
        folder,
        patches=None if plain else "all",
        arguments=(),
        path=[engine_folder(env.plain)],
        more={"ASCEND_PATCHES_DEVICE": device},
    )
    command = [str(server.python), str(_env.SCRIPTS / "_matrix_child.py"), str(out), *modules]
    what = f"The imports for {device}, {kind},"
    done = _pair.finished(command, folder, server.env, IMPORT_SECONDS, what)
    if done.returncode:
        raise SetupError(f"{what} failed: {done.stdout.strip()[-600:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found

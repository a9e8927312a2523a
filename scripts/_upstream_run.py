"""Runs somebody else's tests in a process of their own, and reads what the plugin noted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _env
import _upstream_sources
from _system import SetupError, say

SECONDS = 900
TESTS_OF_ASCEND = _env.CHECKOUT / "tests/ascend"
# Of pytest: no cache in the folder of the tests, and nothing that another package brings along.
OPTIONS = (
    "-p",
    "_upstream_plugin",
    "-p",
    "no:cacheprovider",
    "-q",
    "--tb=native",
    "-rN",
    "--continue-on-collection-errors",
)


@dataclass(frozen=True)
class Side:
    """An interpreter with a host, and with the shim or without.

    Attributes:
        path: For PYTHONPATH, before the tests' tools.
        plugins: More plugins for pytest, by their modules.
    """

    python: Path
    patches: str
    path: tuple[Path, ...] = ()
    plugins: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What a process of tests came to; see `_upstream_plugin`."""

    tests: dict[str, dict[str, Any]]
    uncollected: dict[str, str]
    status: dict[str, Any]
    ended: bool

    def calls(self, test: str) -> Counter[str]:
        """How often a test reached each target of ours."""
        found: Counter[str] = Counter(self.tests.get(test, {}).get("calls", {}))
        return Counter({n: c for n, c in found.items() if c and not n.startswith("verify/")})


def pair_of(host: str, release: str) -> dict[str, Side]:
    """Return the two sides of a host; their environments are made if need be.

    Returns:
        `stock` and `patched`.

    Raises:
        SetupError: They cannot be made.
    """
    if host == "vllm":
        env = _env.prepare(device="cpu", release=release, tests=True)
        preload = {"LD_PRELOAD": env.preload} if env.preload else {}
        return {
            "stock": Side(env.plain, "", variables=preload),
            "patched": Side(env.python, "all", variables=preload),
        }
    sys.path[:0] = [str(TESTS_OF_ASCEND)]
    import environment
    import pytest

    ascend = environment.Environment(release)
    try:
        ascend.build()
    except pytest.skip.Exception as reason:
        raise SetupError(f"vllm-ascend {release}: {reason}") from None
    variables = {
        "LD_LIBRARY_PATH": str(ascend.folder / "stubs"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    below = (ascend.folder / "acl", TESTS_OF_ASCEND)
    plugins = ("no_vision",)
    return {
        "stock": Side(ascend.python, "", below, plugins, variables),
        "patched": Side(ascend.python, "all", (_env.CHECKOUT, *below), plugins, variables),
    }


def run(side: Side, folder: Path, paths: list[str], choose: str, scratch: Path) -> Run:
    """Run tests of a folder.

    Args:
        choose: As pytest's -k has it; empty for all.
        scratch: For what the run leaves; it need not exist.
    """
    scratch.mkdir(parents=True)
    report, log = scratch / "report.json", scratch / "log.txt"
    path = (*side.path, _env.SCRIPTS, _upstream_sources.tools(side.python))
    environment = {
        "PATH": f"{side.python.parent}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "HF_HOME": str(_upstream_sources.models()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "UPSTREAM_REPORT": str(report),
        "ASCEND_PATCHES_STATUS_DIR": str(scratch / "status"),
        **({"ASCEND_PATCHES": side.patches} if side.patches else {}),
        **side.variables,
    }
    plugins = [word for name in side.plugins for word in ("-p", name)]
    command = [str(side.python), "-m", "pytest", *plugins, *OPTIONS, "-k", choose, *paths]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(SECONDS)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            # Processes that the tests have left, too.
            _end(process)
    if not report.is_file():
        text = log.read_text(encoding="utf-8", errors="replace")
        raise SetupError(f"{' '.join(paths)}: pytest did not begin:\n{text[-3000:]}")
    found = json.loads(report.read_text(encoding="utf-8"))
    if not found["finished"]:
        say(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    ended = ended and found["finished"]
    return Run(found["tests"], found["uncollected"], found["status"], ended)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()

"""Runs many small checks in one process on the software NPU, each a test of its own in pytest.

A file of checks runs under the environment's Python. It calls `check` on its functions and ends
with `main()`, which prints what became of each. `results` runs such a file from pytest.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKS: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a function; it passes unless it raises, and what it returns is reported."""
    CHECKS[function.__name__] = function
    return function


def main() -> None:
    """Run the checks, or those that are named on the command line; print JSON in the last line."""
    found = {}
    for name, function in CHECKS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        try:
            found[name] = {"passed": True, "value": function()}
        except BaseException:
            found[name] = {"passed": False, "value": traceback.format_exc()}
    print(json.dumps(found), flush=True)


def names(file: str) -> list[str]:
    """Return the checks of a file, without running or importing it."""
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return [
        after.removeprefix("def ").partition("(")[0]
        for line, after in itertools.pairwise(lines)
        if line == "@check"
    ]


def results(npu: Any, file: str, *only: str, seconds: float = 300, **more: Any) -> dict[str, Any]:
    """Run a file's checks on the software NPU and return {name: {passed, value}}."""
    done = npu.run([str(HERE / file), *only], seconds=seconds, **more)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert lines, done.stderr[-6000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found

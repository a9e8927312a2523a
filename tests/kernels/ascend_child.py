"""The scripts beside this file that compile for Ascend, in an interpreter that has the compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("ASCEND_TRITON_PYTHON", sys.executable)
NEEDED = "triton-ascend 3.2.0 and ascendnpu-ir 1.2.0"
# A Triton for GPUs has the same name.
PROBE = (
    "import importlib.util as u, os; s = u.find_spec('triton'); "
    "assert u.find_spec('ascendnpuir'); "
    "assert os.path.isdir(s.submodule_search_locations[0] + '/backends/ascend')"
)
ARCHITECTURES = ["Ascend910B1", "Ascend910B3", "Ascend910B4", "Ascend910_9391"]


def needs_compiler() -> None:
    """Skip the test where `PYTHON` has no compiler for Ascend."""
    if subprocess.run([PYTHON, "-c", PROBE], capture_output=True).returncode:
        pytest.skip(f"{NEEDED} are not installed for {PYTHON} (ASCEND_TRITON_PYTHON)")


def found_by(script: str, *arguments: str, architecture: str = "Ascend910B3") -> dict[str, Any]:
    """What a script prints last: {"versions": of the compiler, "rows": {case: what it found}}.

    Skips the test where there is no compiler.
    """
    needs_compiler()
    path = os.pathsep.join((str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_ASCEND_ARCH": architecture}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    command = [PYTHON, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def executable_here() -> None:
    """Skip the test where a tool that executes the lowered form is missing."""
    for tool in ("/usr/lib/llvm-19/bin/mlir-translate", "/usr/lib/llvm-19/bin/llc", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing (Debian: mlir-19-tools, llvm-19, gcc)")


def same_compiler(found: dict[str, Any], committed: set[str]) -> None:
    """Skip the test where the committed table was made by another compiler."""
    if committed != {found["versions"]}:
        pytest.skip(f"the committed table is of {committed}, here is {found['versions']}")

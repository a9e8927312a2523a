"""How a test runs code in a vllm-ascend environment: what it may use, and what comes back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from environment import ROOT, Environment

HERE = Path(__file__).resolve().parent

START = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
"""

# Triton before torch_npu and vLLM: the interpreter is chosen when triton is imported.
WITH_TRITON = """
import ascend_triton
"""

PLATFORM = """
import functools, json, numpy, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import npu_operators, rotary_oracle
# The operators have kernels for NPU tensors only; redispatch takes CPU tensors to them.
NPU = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

def rotary():
    import ascend_patch
    patches = {p["id"]: p for p in ascend_patch.status()["patches"]}
    return patches.get("rotary", {"state": "off", "reason": "", "targets": []})

def kernels():
    'Ours. Those of torch_npu, which the surface counts, are in npu_operators.used.'
    import ascend_patch
    counts = ascend_patch.status()["kernels"]
    return {name: n for name, n in counts.items() if not name.startswith(("npu::", "atb::"))}

def calls():
    return {t["id"].rpartition(":")[2]: t["calls"] for t in rotary()["targets"] if t["calls"]}
"""


# What building a package generates, which a branch's source lacks.
GENERATED = """
import types
info = sys.modules["vllm_ascend._build_info"] = types.ModuleType("vllm_ascend._build_info")
info.__device_type__ = "A2"
"""

# The release whose environment a branch head runs in. It is no package of the index.
BRANCHES = {
    "v0.11.0-dev": "0.11.0",
    "releases/v0.13.0": "0.13.0",
    "releases/v0.18.0": "0.18.0",
    "releases/v0.23.0": "0.23.0",
}


class Host:
    """vllm-ascend of a final release, or a branch's source over the release that it follows.

    A branch needs DRIFT_SOURCES, a folder that holds its source as `vllm-ascend-` and its name.
    """

    def __init__(self, label: str) -> None:
        self.label, self.release = label, BRANCHES.get(label, label)
        self._variables: dict[str, str] = {}
        if label in BRANCHES:
            folder = os.environ.get("DRIFT_SOURCES")
            source = Path(folder or ".").resolve() / f"vllm-ascend-{label.replace('/', '_')}"
            if not (source / "vllm_ascend").is_dir():
                pytest.skip(f"missing: the source of {label}; DRIFT_SOURCES is {folder or 'unset'}")
        self._environment = Environment(self.release)
        self._environment.build()
        if label in BRANCHES:
            path = (str(ROOT), str(source), str(self._environment.folder / "acl"))
            self._variables["PYTHONPATH"] = os.pathsep.join(path)

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self._environment.python

    def run(self, code: str, *, patches: str, **variables: str) -> str:
        return self._environment.run(code, patches=patches, **self._variables, **variables)


def run(ascend: Host, seed: int, code: str, *, patches: str, triton: bool = True) -> Any:
    """What the code prints last, as JSON; `SEED` is the test's seed.

    Args:
        triton: Whether the release finds Triton, which is then the interpreter.
    """
    generated = GENERATED if ascend.label in BRANCHES else ""
    opening = START + generated + (WITH_TRITON if triton else "") + PLATFORM
    printed = ascend.run(f"SEED = {seed}\n{opening}\n{code}", patches=patches)
    found = json.loads(printed.strip().splitlines()[-1])
    print(ascend.label, patches, found)
    return found

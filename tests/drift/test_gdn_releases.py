"""What patch_gdn_attn decides on each release of vLLM, from its unpacked source."""

from __future__ import annotations

import shutil
from pathlib import Path

import drift_sources
import pytest
from packaging.version import Version

from ascend_patch import _fingerprint, _plan, _registry
from ascend_patch._registry import Band, Symbol
from ascend_patch._versions import Installed

RETIRED = Version("0.20.0")
BUILDER = "vllm.v1.attention.backends.gdn_attn"


def version(root: Path) -> Version:
    return Version(drift_sources.release_at(root))


@pytest.fixture(params=drift_sources.releases("vllm"))
def release(request: pytest.FixtureRequest) -> Path:
    return drift_sources.root_of("vllm", request.param)


def decide(root: Path, release: str, device: str) -> _plan.Decision:
    installed = Installed({"vllm": release}, {"vllm": root}, "vllm", device=device)
    return _plan.decide(_registry.load()["gdn_attn"], installed)


def drifted(release: Path, band: Band, into: Path) -> Path:
    """A tree with what the band looks at, and one more statement in the builder."""
    for name in {symbol.module for target in band.targets for symbol in target.symbols}:
        source = _fingerprint.module_file(release, name)
        if source is not None:
            copy = into / source.relative_to(release)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    file = _fingerprint.module_file(into, BUILDER)
    assert file is not None
    text = file.read_text()
    assert text.count("m = common_attn_metadata\n") == 2
    file.write_text(
        text.replace("m = common_attn_metadata\n", "m = common_attn_metadata; m.x = 1\n")
    )
    return into


def test_each_release_up_to_0_19_is_armed_on_a_gpu(release: Path, tmp_path: Path) -> None:
    name = str(version(release))
    decision = decide(release, name, "cuda")
    if version(release) >= RETIRED:
        assert decision.state == "retired"
        assert "0.20.0" in decision.reason
        assert "#38361" in decision.reason
        return
    assert decision.state == "armed", decision.reason
    assert decision.band is not None
    assert len(decision.band.targets) == 3
    for target in decision.band.targets:
        symbol = Symbol.parse(target.symbol)
        assert _fingerprint.of_symbol(release, symbol.module, symbol.qualname), target.symbol
    strange = decide(drifted(release, decision.band, tmp_path), name, "cuda")
    assert strange.state == "skipped"
    assert "GDNAttentionMetadataBuilder.build: its body differs" in strange.reason


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_on_a_cpu_it_is_for_0_18(release: Path, device: str) -> None:
    decision = decide(release, str(version(release)), device)
    if version(release) >= RETIRED:
        assert decision.state == "retired"
    elif version(release).release[:2] == (0, 18):
        assert decision.state == "armed", decision.reason
    else:
        assert decision.state == "skipped"
        assert f"on {device} is outside of the releases" in decision.reason


def test_upstream_builds_them_from_the_release_that_is_named(release: Path) -> None:
    """What `retired` says, in the source itself."""
    file = _fingerprint.module_file(release, BUILDER)
    assert file is not None
    assert ("chunk_indices" in file.read_text()) == (version(release) >= RETIRED)

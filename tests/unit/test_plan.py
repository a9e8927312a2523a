"""What each patch will do here, decided before anything is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascend_patch import _fingerprint, _plan, _records
from ascend_patch._plan import decide, digest, plan
from ascend_patch._registry import Band, Patch, Target, order
from ascend_patch._selection import Selection
from ascend_patch._versions import Installed

SOURCE = "def f(x):\n    return x\n\ndef g(x):\n    return x\n\ndef h(x):\n    return x\n"
DRIFTED = "def f(x, y):\n    return x\n\ndef g(x):\n    return -x\n"
TARGETS = tuple(Target(f"vllm.ops:{name}", "host", "ours:f") for name in "fgh")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a fake vllm of any version and source; 1.0 and 1.1 are recorded with SOURCE."""
    symbols = {
        f"vllm.ops:{name}": [found.signature, found.digest]
        for name in "fgh"
        if (found := _fingerprint.of_source(SOURCE, name))
    }
    record = {"source": {}, "symbols": symbols}
    data = {"1.0": record, "1.1": record}
    monkeypatch.setattr(_records, "_data", lambda host: data if host == "vllm" else {})

    def make(
        version: str, source: str = SOURCE, host="vllm", roots=True, device="cpu"
    ) -> Installed:
        (tmp_path / "vllm").mkdir(exist_ok=True)
        (tmp_path / "vllm" / "ops.py").write_text(source)
        folders = {host: Path(tmp_path)} if roots else {}
        return Installed({host: version}, folders, host, device=device)

    return make


def patch(*bands: Band, name: str = "demo", **more) -> Patch:
    bands = bands or (Band("vllm", ">=1.0,<2.0", ("1.0", "1.1"), TARGETS),)
    return Patch(name, more.pop("version", "1"), "s", "w", "u", "r", bands, **more)


RETIRED = Band("vllm", ">=2.0", retired="vllm 2.0 has it")


@pytest.mark.parametrize("version", ["1.0", "1.0+cpu", "1.0.0", "1.5.post1", "1.1+empty"])
def test_a_final_release_in_the_band_is_armed(installed, version):
    found = decide(patch(), installed(version))
    assert (found.state, found.releases) == ("armed", ("1.0", "1.1"))
    assert found.reason == "the source is that of vllm 1.0 and 1.1"


@pytest.mark.parametrize("version", ["2.0", "0.9", "2.0+cpu"])
def test_a_final_release_outside_of_the_band_is_skipped(installed, version):
    found = decide(patch(), installed(version))
    assert found.state == "skipped"
    assert (
        f"vllm {version} is outside of the releases it is written for (>=1.0,<2.0)" in found.reason
    )


@pytest.mark.parametrize(
    "version", ["2.0rc1", "9.9.dev3+gabc", "0.1.dev1", "unknown", "", "dev", "1.0rc2"]
)
def test_what_is_no_final_release_is_accepted_by_its_source(installed, version):
    assert decide(patch(), installed(version)).state == "armed"


@pytest.mark.parametrize("version", ["1.0", "1.0.dev1", "unknown"])
def test_a_source_that_has_drifted_is_refused_and_named(installed, version):
    found = decide(patch(), installed(version, DRIFTED))
    assert found.state == "skipped"
    for part in (
        "f: its parameters are (x, y), recorded for 1.1 (x)",
        "g: its body differs from 1.1",
        "h is not there (vllm.ops); 1.1 has it",
    ):
        assert part in found.reason


def test_at_most_three_differences_are_shown(installed):
    context = Target("vllm.ops:f", "host", "ours:f", context=("vllm.gone:k", "vllm.gone:l"))
    band = Band("vllm", "==1.0", ("1.0",), (context, *TARGETS))
    found = decide(patch(band), installed("1.0", DRIFTED))
    assert found.reason.endswith("; and 2 more")


def test_a_source_that_cannot_be_parsed_is_refused(installed):
    found = decide(patch(), installed("1.0", "def f(:\n"))
    assert found.state == "skipped"
    assert "cannot be read" in found.reason


def test_sources_that_are_not_found_are_no_match(installed):
    found = decide(patch(), installed("1.0", roots=False))
    assert (found.state, "were not found" in found.reason) == ("skipped", True)


def test_a_release_that_has_it_needs_it_no_more(installed):
    found = decide(patch(*patch().bands, RETIRED), installed("2.1"))
    assert (found.state, found.reason) == ("retired", "vllm 2.0 has it")


def test_a_development_build_is_not_retired_by_its_version(installed):
    found = decide(patch(*patch().bands, RETIRED), installed("2.1.dev1"))
    assert found.state == "armed"


def test_a_development_build_of_what_is_only_retired_is_skipped_in_a_whole_sentence(installed):
    found = decide(patch(RETIRED), installed("2.1.dev1"))
    assert found.state == "skipped"
    assert not found.reason.rstrip().endswith(":")


def test_targets_of_the_other_host_are_superseded(installed):
    found = decide(patch(), installed("1.0", host="vllm_ascend"))
    assert found.state == "superseded"
    assert "vllm_ascend is the active host and this patch has targets in vllm only" in found.reason


def test_a_band_without_versions_is_decided_by_the_source(installed):
    band = Band("vllm", "", ("1.0",), TARGETS)
    assert decide(patch(band), installed("0.0.1")).state == "armed"
    assert decide(patch(band), installed("0.0.1", DRIFTED)).state == "skipped"


EMULATED = Band("vllm", "==1.0", ("1.0",), TARGETS, devices=("emulated",))
ELSEWHERE = Band("vllm", "", retired="it is right there", devices=("cuda", "cpu"))


@pytest.mark.parametrize(
    ("version", "device", "source", "state", "reason"),
    [
        ("1.0", "emulated", SOURCE, "armed", "the source is that of vllm 1.0"),
        ("1.0.dev1", "emulated", SOURCE, "armed", "the source is that of vllm 1.0"),
        ("1.0", "emulated", DRIFTED, "skipped", "the source of vllm 1.0 on emulated is none"),
        ("1.1", "emulated", SOURCE, "skipped", "vllm 1.1 on emulated is outside of the releases"),
        ("1.0", "cpu", DRIFTED, "retired", "it is right there"),
        # Whatever the release: nothing is known of a development build but its device.
        ("9.9", "cuda", SOURCE, "retired", "it is right there"),
        ("9.9.dev3+gabc", "cpu", DRIFTED, "retired", "it is right there"),
        ("unknown", "cpu", SOURCE, "retired", "it is right there"),
        ("1.0", "npu", SOURCE, "skipped", "vllm 1.0 on npu is nothing that it is written for"),
    ],
)
def test_a_band_may_be_for_some_devices(installed, version, device, source, state, reason):
    found = decide(patch(EMULATED, ELSEWHERE), installed(version, source, device=device))
    assert found.state == state
    assert reason in found.reason


def test_what_is_skipped_names_the_releases_of_the_device_alone(installed):
    other = Band("vllm", ">=3.0", ("1.0",), TARGETS, devices=("cpu",))
    found = decide(patch(EMULATED, other), installed("1.1", device="emulated"))
    assert found.reason.endswith("it is written for (==1.0)")


def test_what_is_skipped_names_the_devices_that_this_release_has_it_on(installed):
    other = Band("vllm", "==1.0", ("1.0",), TARGETS, devices=("cpu", "cuda"))
    later = Band("vllm", ">=2.0", retired="it is right there")
    found = decide(patch(other, later), installed("1.0", device="npu"))
    assert found.state == "skipped"
    assert found.reason.endswith("written for (>=2.0); this release has it on cpu, cuda")


def test_a_patch_without_code_says_so(installed):
    found = decide(Patch("demo", "1", "s", "w", "u", "r"), installed("1.0"))
    assert (found.state, "has no code for it yet" in found.reason) == ("skipped", True)


def planned(installed, *patches: Patch, ids: tuple[str, ...] = ()) -> dict[str, _plan.Decision]:
    registry = order(list(patches))
    return plan(Selection(ids or tuple(registry), frozenset()), registry, installed)


def test_only_selected_patches_are_decided(installed):
    found = planned(installed("1.0"), patch(name="a"), patch(name="b"), ids=("b",))
    assert list(found) == ["b"]


def test_a_patch_needs_what_it_requires(installed):
    needs = patch(name="b", requires=("a",))
    found = planned(installed("1.0"), patch(name="a"), needs, ids=("b",))
    assert found["b"].reason == "it needs patch a, which is not selected"
    outside = patch(Band("vllm", "==9.0", ("1.0",), TARGETS), name="a")
    found = planned(installed("1.0"), outside, needs)
    assert found["b"].reason == "it needs patch a, which is skipped"
    assert planned(installed("1.0"), patch(name="a"), needs)["b"].state == "armed"


def test_a_retired_requirement_is_met(installed):
    there = Band("vllm", ">=1.0", retired="it is in the release")
    found = planned(installed("1.0"), patch(there, name="a"), patch(name="b", requires=("a",)))
    assert [d.state for d in found.values()] == ["retired", "armed"]


@pytest.mark.parametrize("declared_by", ["a", "b"])
def test_of_two_that_conflict_the_first_wins(installed, declared_by):
    links = {declared_by: {"conflicts": ("b" if declared_by == "a" else "a",)}}
    found = planned(
        installed("1.0"), *(patch(name=name, **links.get(name, {})) for name in ("a", "b"))
    )
    assert [d.state for d in found.values()] == ["armed", "skipped"]
    assert found["b"].reason == "it conflicts with patch a, which comes first"


def test_a_skipped_patch_conflicts_with_nobody(installed):
    outside = patch(Band("vllm", "==9.0", ("1.0",), TARGETS), name="a", conflicts=("b",))
    assert planned(installed("1.0"), outside, patch(name="b"))["b"].state == "armed"


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(2)], ids=["error", "exit"])
def test_a_fault_while_one_is_decided_fails_that_one(installed, monkeypatch, error):
    def raising(patch, found):
        if patch.id == "a":
            raise error
        return decide(patch, found)

    monkeypatch.setattr(_plan, "decide", raising)
    found = planned(installed("1.0"), patch(name="a"), patch(name="b"))
    assert [d.state for d in found.values()] == ["failed", "armed"]
    assert type(error).__name__ in found["a"].reason


def test_the_digest_is_empty_where_nothing_will_apply(installed):
    assert digest(planned(installed("9.0"), patch()), "cpu") == ""


def test_the_digest_depends_on_what_changes_the_graph_and_on_nothing_else(installed):
    one = planned(installed("1.0"), patch())
    same = planned(installed("1.0+cpu"), patch())
    assert digest(one, "cpu") == digest(same, "cpu") != ""
    assert digest(one, "npu") != digest(one, "cpu")
    assert digest(planned(installed("1.0"), patch(version="2")), "cpu") != digest(one, "cpu")
    two = planned(installed("1.0"), patch(), patch(name="other"))
    assert digest(two, "cpu") != digest(one, "cpu")
    skipped = planned(
        installed("1.0"), patch(), patch(Band("vllm", "==9", ("1.0",), TARGETS), name="x")
    )
    assert digest(skipped, "cpu") == digest(one, "cpu")

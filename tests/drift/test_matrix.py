"""Every cell of releases and patches: what the source says is what the registry says."""

from __future__ import annotations

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import derived_ascend
import derived_vllm
import drift_sources
import pytest
from packaging.version import Version
from release_tree import Definition, Tree, plain

from ascend_patch import _plan, _records, _registry
from ascend_patch._registry import HOSTS, Band, Host, Symbol
from ascend_patch._versions import Installed

PATCHES = sorted(_registry.load())
DERIVED = {"vllm": derived_vllm.PATCHES, "vllm_ascend": derived_ascend.PATCHES}


def test_no_patch_is_without_a_derivation() -> None:
    for host, derivations in DERIVED.items():
        assert sorted(derivations) == PATCHES, host


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(("host", "release"), drift_sources.cells())
def test_the_registry_says_what_the_source_says(host: Host, release: str, patch: str) -> None:
    trees = {name: Tree(root, name) for name, root in drift_sources.roots_of(host, release).items()}
    for device in drift_sources.DEVICES[host]:
        if host == "vllm":
            derived = derived_vllm.PATCHES[patch](trees[host], release, device)
        else:
            derived = derived_ascend.PATCHES[patch](trees[host], trees["vllm"], release)
        decision = drift_sources.decide(patch, host, release, device)
        where = f"{host} {release} on {device}: {derived.why}; the registry: {decision.reason}"
        assert drift_sources.state(decision) == derived.state, where
        if decision.band is None:
            assert decision.reason, where
            if host == "vllm_ascend":
                minor = ".".join(_records.below(release).split(".")[:2])
                told = [text for text in _registry.load()[patch].untouched if minor in text]
                assert told, f"{where}; nothing in `untouched` tells a user why"
            continue
        assert decision.band.host == host
        targets = {target.symbol for target in decision.band.targets}
        if derived.places is not None:
            assert targets == derived.places, where
        modules = {Symbol.parse(symbol).module for symbol in targets}
        assert derived.modules <= modules, where


# --- no cell is missing -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_each_release_of_the_package_index_is_a_cell(host: Host) -> None:
    """Asked of the index: what came out since is to be recorded and decided."""
    try:
        found = drift_sources.listed(host)
    except drift_sources.Problem as problem:
        pytest.skip(f"the package index is missing: {problem}")
    first = Version(drift_sources.FIRST)
    expected = {release for release in found if Version(release) >= first}
    cells = {one for one in drift_sources.RELEASES[host] if not drift_sources.is_branch(one)}
    assert expected == cells, f"scripts/record_release {host} RELEASE, then scripts/_releases.py"


@pytest.mark.parametrize("host", HOSTS)
def test_each_recorded_release_is_a_cell(host: Host) -> None:
    assert set(_records.releases(host)) <= set(drift_sources.RELEASES[host])


# --- heads of branches --------------------------------------------------------------------------

BRANCHES = [
    pytest.param(one, id=one, marks=drift_sources.marks("vllm_ascend", one))
    for one in drift_sources.RELEASES["vllm_ascend"]
    if drift_sources.is_branch(one)
]


def what_is_relied_on(release: str, band: Band) -> dict[str, str | None]:
    """Each symbol of a band as a release has it, without comments and annotations."""
    trees = {
        name: Tree(root, name)
        for name, root in drift_sources.roots_of("vllm_ascend", release).items()
    }
    found: dict[str, str | None] = {}
    for target in band.targets:
        for symbol in target.symbols:
            tree = trees["vllm" if symbol.package == "vllm" else "vllm_ascend"]
            found[str(symbol)] = text_of(tree, str(symbol))
    return found


def text_of(tree: Tree, place: str) -> str | None:
    module, _, name = place.partition(":")
    source = tree.module(module)
    if source is None:
        return None
    if name == "<module>":
        # Imports and definitions are not what importing a module does to others.
        kinds = (ast.Import, ast.ImportFrom, Definition, ast.Pass)
        code = [node for node in source.body if not isinstance(node, kinds)]
        return "\n".join(plain(node) for node in code)
    node = tree.node(place)
    return None if node is None else plain(node)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_head_is_recognised_as_such(branch: str, patch: str) -> None:
    """By its source: its version string is that of the release, or one that sorts below it.

    Where all that a patch looks at is the same in both, both are named.
    """
    release = _records.below(branch)
    roots = drift_sources.roots_of("vllm_ascend", branch)
    registry = _registry.load()
    found = []
    for version in (release, f"{release}rc3.dev11+g1234567", "0.1.dev1"):
        installed = Installed({"vllm_ascend": version}, roots, "vllm_ascend", device="npu")
        found.append(_plan.decide(registry[patch], installed))
    assert {one.state for one in found} == {found[0].state}
    assert {one.releases for one in found} == {found[0].releases}
    band = found[0].band
    if band is None:
        assert found[0].state == "skipped"
        return
    assert branch in band.releases
    same = what_is_relied_on(branch, band) == what_is_relied_on(release, band)
    assert found[0].releases == ((release, branch) if same else (branch,))
    if not same:
        # And the release is not taken for the branch either.
        assert branch not in drift_sources.decide(patch, "vllm_ascend", release, "npu").releases


@pytest.mark.slow
def test_some_branch_head_differs_from_its_release_for_each_kind_of_decision() -> None:
    """The control of the test above: were they all the same, it would compare nothing."""
    differ = set()
    for patch in PATCHES:
        for branch in ("releases/v0.13.0", "releases/v0.18.0", "releases/v0.23.0"):
            decision = drift_sources.decide(patch, "vllm_ascend", branch, "npu")
            if decision.releases == (branch,):
                differ.add((patch, branch))
    assert {patch for patch, _ in differ} >= {"rotary", "attention_router", "kv_connector"}


# --- releases that nobody knows yet -------------------------------------------------------------

NEWER = {"vllm": "0.34.0", "vllm_ascend": "0.24.0"}
# What a newer vLLM is told without a look at its source: these stay retired, as what was wrong is
# mended there; the others wait for somebody to read it.
OPEN = {
    "attention_router": {"cuda": "retired", "cpu": "retired", "npu": "retired"},
    "gdn_attn": dict.fromkeys(("cuda", "cpu", "emulated", "npu"), "retired"),
    "kv_connector": dict.fromkeys(("cuda", "cpu", "emulated", "npu"), "retired"),
    "rotary": {},
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_newer_vllm_is_told_so(patch: str) -> None:
    """Even one whose source is that of the newest release: its version was never looked at."""
    roots = drift_sources.roots_of("vllm", drift_sources.RELEASES["vllm"][-1])
    for device in drift_sources.DEVICES["vllm"]:
        decision = drift_sources.decide(patch, "vllm", NEWER["vllm"], device, roots=roots)
        expected = OPEN[patch].get(device, "skipped")
        assert drift_sources.state(decision) == expected, decision.reason
        if expected == "skipped":
            assert f"vllm {NEWER['vllm']}" in decision.reason
            assert "is outside of the releases it is written for" in decision.reason


@pytest.mark.parametrize("patch", PATCHES)
def test_a_newer_vllm_ascend_is_applied_to_only_where_its_source_is_known(
    patch: str, tmp_path: Path
) -> None:
    """Its version decides nothing: a source that is a known one is, and any other is left alone."""
    known = drift_sources.roots_of("vllm_ascend", "0.18.0")
    before = drift_sources.decide(patch, "vllm_ascend", "0.18.0", "npu", roots=known)
    assert before.state == "armed"
    same = drift_sources.decide(patch, "vllm_ascend", NEWER["vllm_ascend"], "npu", roots=known)
    assert (same.state, same.releases) == (before.state, before.releases)
    assert before.band is not None
    # A host symbol of the band, with another body.
    own = next(t for t in before.band.targets if t.symbol.startswith("vllm_ascend."))
    moved = moved_copy(known["vllm_ascend"], own.symbol, tmp_path)
    roots: dict[Host, Path] = {"vllm": known["vllm"], "vllm_ascend": moved}
    decision = drift_sources.decide(patch, "vllm_ascend", NEWER["vllm_ascend"], "npu", roots=roots)
    assert decision.state == "skipped"
    name = Symbol.parse(own.symbol).qualname
    assert f"{name}: its body differs" in decision.reason


def moved_copy(root: Path, place: str, into: Path) -> Path:
    """The package with one more statement in a function."""
    shutil.copytree(
        root / "vllm_ascend",
        into / "vllm_ascend",
        ignore=lambda folder, names: [
            name for name in names if "." in name and not name.endswith(".py")
        ],
    )
    tree = Tree(into, "vllm_ascend")
    node, file = tree.node(place), tree.file(Symbol.parse(place).module)
    assert node is not None
    assert file is not None
    lines = file.read_text().splitlines(keepends=True)
    last = node.body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "moved = 1\n")
    file.write_text("".join(lines))
    return into


def test_beside_vllm_ascend_a_patch_of_vllm_alone_is_superseded() -> None:
    """What the registry would say of a patch that has nothing for the active host."""
    rotary = _registry.load()["rotary"]
    alone = replace(rotary, bands=tuple(band for band in rotary.bands if band.host == "vllm"))
    roots = drift_sources.roots_of("vllm_ascend", "0.18.0")
    versions = {"vllm": "0.18.0", "vllm_ascend": "0.18.0"}
    decision = _plan.decide(alone, Installed(versions, roots, "vllm_ascend", device="npu"))
    assert decision.state == "superseded"
    assert decision.reason == (
        "vllm_ascend is the active host and this patch has targets in vllm only"
    )
    # And a patch of both is decided by the active host's bands alone.
    for patch in _registry.load().values():
        decision = _plan.decide(patch, Installed(versions, roots, "vllm_ascend", device="npu"))
        assert decision.band is not None
        assert decision.band.host == "vllm_ascend"

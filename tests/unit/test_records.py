"""Which recorded releases an installed source equals, and what to say about the others."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ascend_patch import _fingerprint, _records, _registry
from ascend_patch._registry import HOSTS, Host, Symbol

BODY = "class Rope:\n    def forward(self, q, key=None):\n        return q * {}\n"
FORWARD = Symbol("vllm.rope", "Rope.forward")
LIMIT = Symbol("vllm.rope", "LIMIT")
NEW = Symbol("vllm.fresh", "added")
Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write modules of the package `vllm` and return the folder that holds it."""

    def write(**modules: str) -> Path:
        for name, source in modules.items():
            file = tmp_path / "vllm" / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)
        return tmp_path

    return write


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three releases: 1.9 differs in its body, 1.10 and its branch only in LIMIT; one has NEW."""

    def entry(source: str, symbol: Symbol) -> list[str] | None:
        found = _fingerprint.of_source(source, symbol.qualname)
        return None if found is None else [found.signature, found.digest]

    def release(factor: int, limit: int, added: str) -> dict[str, object]:
        rope = f"LIMIT = {limit}\n{BODY.format(factor)}"
        symbols = {str(symbol): entry(rope, symbol) for symbol in (FORWARD, LIMIT)}
        return {
            "source": {"kind": "tree", "name": "t"},
            "symbols": {**symbols, str(NEW): entry(added, NEW)},
        }

    data = {
        "1.10.0": release(2, 4, ""),
        "releases/v1.10.0": release(2, 5, "def added(): ..."),
        "1.9.0": release(1, 4, ""),
    }
    monkeypatch.setattr(_records, "_data", lambda host: data if host == "vllm" else {})


def compare(root: Path, *symbols: Symbol, releases: tuple[str, ...] = ()) -> _records.Match:
    return _records.match("vllm", {"vllm": root}, symbols, releases or _records.releases("vllm"))


@pytest.mark.usefixtures("recorded")
class TestMatch:
    def test_releases_are_ordered_as_versions_and_branches_behind_their_release(self) -> None:
        assert _records.releases("vllm") == ("1.9.0", "1.10.0", "releases/v1.10.0")

    def test_every_release_that_agrees_is_named(self, tree: Tree) -> None:
        found = compare(tree(rope=BODY.format(2)), FORWARD)
        assert found
        assert found.agreeing == ("1.10.0", "releases/v1.10.0")
        assert found.differences == ()

    def test_all_symbols_have_to_agree(self, tree: Tree) -> None:
        found = compare(tree(rope="LIMIT = 5\n" + BODY.format(2)), FORWARD, LIMIT)
        assert found.agreeing == ("releases/v1.10.0",)
        assert found.nearest == "releases/v1.10.0"

    def test_only_the_given_releases_are_compared_with(self, tree: Tree) -> None:
        found = compare(tree(rope=BODY.format(1)), FORWARD, releases=("1.10.0",))
        assert not found
        assert found.nearest == "1.10.0"

    def test_a_body_that_differs(self, tree: Tree) -> None:
        found = compare(tree(rope=BODY.format(3)), FORWARD)
        assert not found
        # All three differ in as much: the latest is the nearest.
        assert found.nearest == "releases/v1.10.0"
        assert found.differences == ("Rope.forward: its body differs from releases/v1.10.0",)

    def test_a_signature_that_moved(self, tree: Tree) -> None:
        moved = BODY.format(2).replace("key=None", "key")
        assert compare(tree(rope=moved), FORWARD, releases=("1.10.0",)).differences == (
            "Rope.forward: its parameters are (self, q, key), recorded for 1.10.0 "
            "(self, q, key=None)",
        )

    @pytest.mark.parametrize("source", ["", "class Rope: ...", "def forward(): ..."])
    def test_a_symbol_that_is_gone(self, tree: Tree, source: str) -> None:
        assert compare(tree(rope=source), FORWARD, releases=("1.10.0",)).differences == (
            "Rope.forward is not there (vllm.rope); 1.10.0 has it",
        )

    def test_a_module_that_is_gone(self, tmp_path: Path) -> None:
        assert compare(tmp_path, FORWARD, releases=("1.10.0",)).differences == (
            "Rope.forward is not there (vllm.rope); 1.10.0 has it",
        )

    def test_a_symbol_that_the_release_does_not_have(self, tree: Tree) -> None:
        root = tree(fresh="def added(): ...")
        assert compare(root, NEW, releases=("1.10.0",)).differences == (
            "added is there (vllm.fresh); 1.10.0 has no such symbol",
        )
        assert compare(root, NEW).agreeing == ("releases/v1.10.0",)

    def test_absent_there_and_absent_in_the_record_is_agreement(self, tmp_path: Path) -> None:
        assert compare(tmp_path, NEW).agreeing == ("1.9.0", "1.10.0")

    def test_the_nearest_release_has_the_fewest_differences(self, tree: Tree) -> None:
        found = compare(tree(rope="LIMIT = 4\n" + BODY.format(7)), FORWARD, LIMIT)
        assert not found
        # 1.9.0 and 1.10.0 differ in the body alone, the branch in both.
        assert found.nearest == "1.10.0"

    def test_a_source_that_cannot_be_read_is_a_difference(self, tree: Tree) -> None:
        (sentence,) = compare(tree(rope="def f(:"), FORWARD, releases=("1.10.0",)).differences
        assert sentence.startswith("Rope.forward: the source of vllm.rope cannot be read")

    def test_a_symbol_that_was_never_recorded_says_what_to_run(self, tree: Tree) -> None:
        unknown = Symbol("vllm.rope", "Rope")
        found = compare(tree(rope=BODY.format(2)), unknown, releases=("1.10.0",))
        assert "run scripts/record_release vllm 1.10.0" in found.differences[0]

    def test_a_release_that_was_never_recorded_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(_records.RecordError, match=r"recorded: 1\.9\.0, 1\.10\.0"):
            compare(tmp_path, FORWARD, releases=("2.0.0",))

    def test_no_release_at_all(self, tmp_path: Path) -> None:
        found = _records.match("vllm", {"vllm": tmp_path}, (FORWARD,), ())
        assert found == _records.Match((), "", ())


class TestSymbolsOfVllm:
    """A target in vllm_ascend that names vLLM's own code, in a folder of its own."""

    OWN = Symbol("vllm_ascend.rope", "Rope.forward")

    @pytest.fixture
    def roots(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Host, Path]:
        roots: dict[Host, Path] = {}
        for host in HOSTS:
            file = tmp_path / f"of_{host}" / host / "rope.py"
            file.parent.mkdir(parents=True)
            file.write_text(BODY.format(len(host)))
            roots[host] = file.parent.parent

        def entry(host: Host) -> list[str]:
            found = _fingerprint.of_source(BODY.format(len(host)), FORWARD.qualname)
            assert found
            return [found.signature, found.digest]

        def release(host: Host, symbol: Symbol) -> dict[str, object]:
            return {"source": {}, "symbols": {str(symbol): entry(host)}}

        ascend = release("vllm_ascend", self.OWN)
        data = {
            "vllm": {"1.2.0": release("vllm", FORWARD)},
            "vllm_ascend": {"1.2.0": ascend, "releases/v1.2.0": ascend, "1.3.0": ascend},
        }
        monkeypatch.setattr(_records, "_data", lambda host: data[host])
        return roots

    def match(self, roots: dict[Host, Path]) -> _records.Match:
        releases = _records.releases("vllm_ascend")
        return _records.match("vllm_ascend", roots, (FORWARD, self.OWN), releases)

    def test_they_are_held_to_the_vllm_release_of_that_version(self, roots) -> None:
        # For 1.3.0 no vLLM is recorded.
        assert self.match(roots).agreeing == ("1.2.0", "releases/v1.2.0")

    def test_another_vllm_is_a_difference(self, roots) -> None:
        (roots["vllm"] / "vllm/rope.py").write_text(BODY.format(7))
        found = _records.match("vllm_ascend", roots, (FORWARD, self.OWN), ("releases/v1.2.0",))
        assert not found
        assert found.differences == ("Rope.forward: its body differs from vllm 1.2.0",)

    def test_a_vllm_that_is_not_there_is_a_difference(self, roots) -> None:
        del roots["vllm"]
        assert "the sources of vllm were not found" in self.match(roots).differences[0]


# --- the committed data ------------------------------------------------------------------------


def entries() -> list[tuple[Host, str]]:
    return [(host, release) for host in HOSTS for release in _records.releases(host)]


@pytest.mark.parametrize("host", HOSTS)
def test_each_symbol_exists_in_a_recorded_release(host: Host) -> None:
    absent = [
        str(symbol)
        for symbol in _records.symbols(host)
        if not any(
            _records.fingerprint(host, release, symbol) for release in _records.releases(host)
        )
    ]
    assert absent == [], "a symbol that no release has is misspelt, or was never one"


@pytest.mark.parametrize(("host", "release"), entries())
def test_each_release_records_what_the_registry_names_and_no_more(host: Host, release: str) -> None:
    recorded = set(_records._data(host)[release]["symbols"])
    assert recorded == {str(symbol) for symbol in _records.symbols(host)}


@pytest.mark.parametrize(("host", "release"), entries())
def test_each_release_says_where_it_comes_from(host: Host, release: str) -> None:
    source = _records.source(host, release)
    assert source["kind"] in {"wheel", "sdist", "tree"}
    # A branch moves: its name alone would not say what was read.
    if not release[0].isdigit():
        assert re.fullmatch("[0-9a-f]{40}", source["commit"])


def test_the_recorded_releases_are_those_of_the_design() -> None:
    # One of each kind of source that the releases 0.11.0 to 0.33.0 have, as far as patches see it.
    assert _records.releases("vllm") == (
        "0.11.0",
        "0.11.2",
        "0.12.0",
        "0.13.0",
        "0.14.1",
        "0.15.1",
        "0.16.0",
        "0.17.0",
        "0.18.0",
        "0.19.1",
        "0.20.2",
        "0.22.1",
        "0.23.0",
        "0.25.1",
        "0.26.0",
        "0.27.1",
        "0.29.0",
        "0.30.0",
        "0.31.0",
        "0.32.0",
        "0.33.0",
    )
    assert _records.releases("vllm_ascend") == (
        "0.11.0",
        "v0.11.0-dev",
        "0.13.0",
        "releases/v0.13.0",
        "0.18.0",
        "releases/v0.18.0",
        "0.23.0",
        "releases/v0.23.0",
    )


def test_every_band_names_releases_that_are_recorded_and_have_its_targets() -> None:
    for patch in _registry.load().values():
        for band in patch.bands:
            for release in band.releases:
                for target in band.targets:
                    symbol = Symbol.parse(target.symbol)
                    own = symbol.package == band.host
                    where = release if own else _records.below(release)
                    found = _records.fingerprint(symbol.package, where, symbol)
                    assert found, f"{patch.id}: {symbol} is not in {symbol.package} {where}"


@pytest.mark.parametrize("host", HOSTS)
def test_the_data_is_sorted_one_symbol_a_line_and_names_no_machine(host: Host) -> None:
    text = (Path(_records.__file__).parent / "data" / f"{host}.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(_records.releases(host))
    for release in json.loads(text).values():
        assert list(release["symbols"]) == sorted(release["symbols"])
    assert sum(line.startswith('   "') for line in text.splitlines()) == len(
        _records.symbols(host)
    ) * len(_records.releases(host))
    assert not re.search(r"/(home|root|work|tmp)/|https?:", text)


def test_the_data_is_read_from_a_zipped_package(tmp_path: Path) -> None:
    import subprocess
    import sys

    package = Path(_records.__file__).parent
    with zipfile.ZipFile(tmp_path / "shim.zip", "w") as archive:
        for file in [*package.rglob("*.py"), *package.rglob("*.json")]:
            archive.write(file, f"ascend_patch/{file.relative_to(package)}")
    code = "from ascend_patch import _records; print(_records.releases('vllm')[0])"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, 'shim.zip'); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "0.11.0\n", done.stderr

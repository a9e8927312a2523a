"""docs/releases.md is what the registry and the sources say, row by row."""

from __future__ import annotations

from pathlib import Path

import compile_cache
import drift_sources
import pytest
from drift_sources import release_table

from ascend_patch import _registry
from ascend_patch._registry import HOSTS, Host

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "releases.md"


@pytest.mark.parametrize(("host", "release"), drift_sources.cells())
def test_a_row_is_current(host: Host, release: str) -> None:
    drift_sources.roots_of(host, release)  # skips where they are missing
    compiled = ""
    if host == "vllm":
        compiled = compile_cache.in_words(drift_sources.root_of(host, release))
    line, cells = release_table.row(host, release, compiled)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert line in text.splitlines(), "run scripts/update_releases"
    for patch, cell in cells.items():
        for reason in cell.reasons:
            assert any(
                one.startswith(f"- `{patch}`, ") and one.endswith(f", {reason}")
                for one in text.splitlines()
            ), f"{patch}: {reason}; run scripts/update_releases"


@pytest.mark.parametrize("host", HOSTS)
def test_each_release_has_a_row_and_each_patch_a_column(host: Host) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head = release_table.header(host)
    assert head in text
    body = text.partition(head)[2].lstrip("\n").partition("\n\n")[0]
    rows = [line.split("|")[1].split()[0] for line in body.splitlines()]
    assert rows == list(drift_sources.RELEASES[host])
    for patch in _registry.load():
        assert f"`{patch}`" in head
    assert all(line.count("|") == head.splitlines()[0].count("|") for line in body.splitlines())


@pytest.mark.slow
def test_the_document_is_what_the_command_writes() -> None:
    for host in HOSTS:
        for release in drift_sources.RELEASES[host]:
            drift_sources.root_of(host, release)
    compiled = {
        release: compile_cache.in_words(drift_sources.root_of("vllm", release))
        for release in drift_sources.RELEASES["vllm"]
    }
    assert release_table.document(compiled) == DOCUMENT.read_text(encoding="utf-8")


def test_releases_are_named_as_ranges_of_rows() -> None:
    order = drift_sources.RELEASES["vllm"]
    assert release_table.spans("vllm", order[:3]) == "0.11.0 to 0.11.2"
    assert release_table.spans("vllm", [order[5], order[0], order[1]]) == "0.11.0 to 0.11.1, 0.14.0"

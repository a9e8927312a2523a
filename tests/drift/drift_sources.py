"""The real sources that these tests read, and which of them are read every day."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import _release_table as release_table
import _releases
from _package_index import Problem, listed
from _releases import DEVICES, FIRST, RELEASES, is_branch

from ascend_patch import _plan, _records, _registry
from ascend_patch._registry import Host
from ascend_patch._versions import Installed

# What is installed for the tests, the newest release, and vllm-ascend over the former: two
# downloads of some 20 MB. Everything else is for --all.
EVERYDAY = {("vllm", "0.18.0"), ("vllm", RELEASES["vllm"][-1]), ("vllm_ascend", "0.18.0")}
STATES = {"armed": "applied"}
# For tests, which cannot import scripts before this module has said where they are.
__all__ = ["DEVICES", "FIRST", "RELEASES", "Problem", "is_branch", "listed", "release_table"]


def cells(*hosts: Host) -> list[Any]:
    """(host, release) of every release, as parameters of a test."""
    return [
        pytest.param(host, release, id=f"{host}-{release}", marks=marks(host, release))
        for host in hosts or ("vllm", "vllm_ascend")
        for release in RELEASES[host]
    ]


def releases(host: Host) -> list[Any]:
    """Every release of a host, as parameters of a test or a fixture."""
    return [pytest.param(release, marks=marks(host, release)) for release in RELEASES[host]]


def marks(host: Host, release: str) -> list[pytest.MarkDecorator]:
    return [] if (host, release) in EVERYDAY else [pytest.mark.slow]


@cache
def _root(host: Host, release: str) -> Path | Problem:
    try:
        return _releases.root_of(host, release)
    except Problem as problem:
        return problem


def root_of(host: Host, release: str) -> Path:
    """The folder that holds a release's package; skips, and says why, where it cannot be had."""
    found = _root(host, release)
    if isinstance(found, Problem):
        pytest.skip(str(found))
    _release_at[found] = release
    return found


_release_at: dict[Path, str] = {}


def release_at(root: Path) -> str:
    """The release of a folder that `root_of` returned."""
    return _release_at[root]


def roots_of(host: Host, release: str) -> dict[Host, Path]:
    """The same with vLLM beside vllm-ascend: some of its targets are methods of vLLM's classes."""
    roots: dict[Host, Path] = {host: root_of(host, release)}
    if host != "vllm":
        roots["vllm"] = root_of("vllm", _records.below(release))
    return roots


def decide(
    patch: str, host: Host, release: str, device: str, *, roots: dict[Host, Path] | None = None
) -> _plan.Decision:
    """What the registry says; a branch head carries the version of the release that it follows."""
    version = _records.below(release) if is_branch(release) else release
    roots = roots_of(host, release) if roots is None else roots
    installed = Installed({host: version}, roots, host, device=device)
    return _plan.decide(_registry.load()[patch], installed)


def state(decision: _plan.Decision) -> str:
    """A decision in the words of the matrix: applied, retired, superseded, skipped."""
    return STATES.get(decision.state, decision.state)

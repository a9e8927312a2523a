"""Every release that is decided: the final releases of the package index, and the branch heads.

Where their sources are: a folder of unpacked releases that DRIFT_SOURCES names, the installed
package, or the cache of `_release_sources`. A head of vllm-ascend is no release of the index; the
folder holds it unpacked, or a bare repository `vllm-ascend.git` from which its recorded commit is
read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import _env
import _release_sources
from _package_index import Problem

from ascend_patch import _records
from ascend_patch._registry import Host

SOURCES = "DRIFT_SOURCES"
FIRST = "0.11.0"
# What `pip index versions vllm` lists from FIRST on; and vllm-ascend's, with its branch heads.
_VLLM = """
0.11.0 0.11.1 0.11.2 0.12.0 0.13.0 0.14.0 0.14.1 0.15.0 0.15.1 0.16.0 0.17.0 0.17.1 0.18.0 0.18.1
0.19.0 0.19.1 0.20.0 0.20.1 0.20.2 0.21.0 0.22.0 0.22.1 0.23.0 0.24.0 0.25.0 0.25.1 0.26.0 0.27.0
0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
"""
_VLLM_ASCEND = """
0.11.0 v0.11.0-dev 0.13.0 releases/v0.13.0 0.18.0 releases/v0.18.0 0.23.0 0.23.0.post1
releases/v0.23.0
"""
VLLM, VLLM_ASCEND = tuple(_VLLM.split()), tuple(_VLLM_ASCEND.split())
RELEASES: dict[Host, tuple[str, ...]] = {"vllm": VLLM, "vllm_ascend": VLLM_ASCEND}
# The device that decides where a patch has bands for some alone.
DEVICES: dict[Host, tuple[str, ...]] = {
    "vllm": ("cuda", "cpu", "emulated", "npu"),
    "vllm_ascend": ("npu",),
}


def is_branch(release: str) -> bool:
    """Whether it is a branch head, which is recorded with its commit."""
    return not release[:1].isdigit()


def root_of(host: Host, release: str, *, fetch: bool = True) -> Path:
    """The folder that holds a release's package.

    Args:
        fetch: Ask the package index where it is neither unpacked nor installed.

    Raises:
        Problem: It is nowhere; the message says where it was looked for.
    """
    found = unpacked(host, release) or installed(host, release)
    if found:
        return found
    folder = os.environ.get(SOURCES)
    if is_branch(release):
        repository = Path(folder or "nowhere") / f"{host.replace('_', '-')}.git"
        if _release_sources.is_repository(repository):
            return _of_commit(host, release, repository)
        raise Problem(
            f"the source of {host} {release} is missing: it is no release of the package index, "
            f"and {SOURCES} ({folder or 'not set'}) holds neither it nor {repository.name}"
        )
    cache = _env.cache_root() / "sources"
    if not fetch and not (cache / _label(host, release)).is_dir():
        raise Problem(f"the source of {host} {release} is not fetched yet")
    return _release_sources.fetched(host, release, cache)[0]


def _of_commit(host: Host, release: str, repository: Path) -> Path:
    commit = _records.source(host, release)["commit"]
    into = _env.cache_root() / "sources" / f"{_label(host, release)}-{commit[:12]}"
    if not (into / host / "__init__.py").is_file():
        _release_sources.archived(host, repository, commit, into)
    return into


def _label(host: Host, release: str) -> str:
    return f"{host.replace('_', '-')}-{release.replace('/', '_')}"


def unpacked(host: Host, release: str) -> Path | None:
    """A release in the folder of sources, whether or not that writes the `v` of its tag."""
    folder = os.environ.get(SOURCES)
    if not folder:
        return None
    distribution, label = host.replace("_", "-"), release.replace("/", "_")
    for name in (f"{distribution}-{label}", f"{distribution}-v{label}"):
        if (Path(folder) / name / host).is_dir():
            return Path(folder) / name
    return None


def installed(host: Host, release: str) -> Path | None:
    """The folder of the installed package, if it is this release. Nothing is imported."""
    spec = importlib.util.find_spec(host)
    if spec is None or not spec.origin:
        return None
    for distribution in (host.replace("_", "-"), f"{host}-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.partition("+")[0] == release:
            return Path(spec.origin).parent.parent
    return None

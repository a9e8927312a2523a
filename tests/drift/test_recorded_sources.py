"""The recorded data against real sources.

DRIFT_SOURCES names a folder of unpacked releases: `vllm-0.18.0/vllm/...`,
`vllm-ascend-v0.18.0/vllm_ascend/...`, and for a branch `vllm-ascend-releases_v0.18.0/...`. Without
it, the vLLM that is installed in the running interpreter is compared.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import pytest

from ascend_patch import _fingerprint, _records
from ascend_patch._registry import HOSTS, Host

# Not ASCEND_PATCHES_*: tests/conftest.py keeps those from every test.
SOURCES = "DRIFT_SOURCES"


def cases() -> list[tuple[Host, str]]:
    return [(host, release) for host in HOSTS for release in _records.releases(host)]


def unpacked(host: Host, release: str) -> Path | None:
    """The folder of an unpacked release, which may or may not write the `v` of its tag."""
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


@pytest.mark.parametrize(("host", "release"), cases())
def test_the_record_is_what_the_source_says(host: Host, release: str) -> None:
    root = unpacked(host, release) or installed(host, release)
    if root is None:
        pytest.skip(
            f"the source of {host} {release} is missing: it is not installed here, and "
            f"{SOURCES} ({os.environ.get(SOURCES) or 'not set'}) holds no "
            f"{host.replace('_', '-')}-{release.replace('/', '_')}"
        )
    drifted = [
        f"{symbol}: recorded {recorded}, found {found}"
        for symbol in _records.symbols(host)
        if (recorded := _records.fingerprint(host, release, symbol))
        != (found := _fingerprint.of_symbol(root, symbol.module, symbol.qualname))
    ]
    assert drifted == []

"""The recorded data against real sources; see `drift_sources` for where they come from."""

from __future__ import annotations

import drift_sources
import pytest

from ascend_patch import _fingerprint, _records
from ascend_patch._registry import HOSTS, Host

CASES = [
    pytest.param(host, release, id=f"{host}-{release}", marks=drift_sources.marks(host, release))
    for host in HOSTS
    for release in _records.releases(host)
]


@pytest.mark.parametrize(("host", "release"), CASES)
def test_the_record_is_what_the_source_says(host: Host, release: str) -> None:
    root = drift_sources.root_of(host, release)
    drifted = [
        f"{symbol}: recorded {recorded}, found {found}"
        for symbol in _records.symbols(host)
        if (recorded := _records.fingerprint(host, release, symbol))
        != (found := _fingerprint.of_symbol(root, symbol.module, symbol.qualname))
    ]
    assert drifted == []

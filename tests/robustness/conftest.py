"""Records which known fault each test covers."""

from __future__ import annotations

import pytest
from known_faults import SENTENCES


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): the entry of known_faults.py that it covers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("fault"):
            (name,) = marker.args
            if name not in SENTENCES:
                raise pytest.UsageError(f"{item.nodeid}: known_faults.py has no entry {name!r}")

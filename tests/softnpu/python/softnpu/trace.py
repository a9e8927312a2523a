"""Which operators this process called on the software NPU, and how often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from softnpu.install import library


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count inside the block; the dict is filled at its end: operator name to calls."""
    found: dict[str, int] = {}
    library().softnpu_counts()
    library().softnpu_count(1)
    try:
        yield found
    finally:
        library().softnpu_count(0)
        for line in library().softnpu_counts().decode().splitlines():
            count, _, name = line.partition(" ")
            found[name] = int(count)

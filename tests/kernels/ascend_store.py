"""Results of the offline compiler on disk, by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "ascend-patch" / "ascend-offline"


def digest(*parts: object) -> str:
    """Of the printed forms of ``parts``."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def digest_of_files(paths: Iterable[Path]) -> str:
    return digest(*(path.read_text() for path in sorted(paths)))


def remember(key: str, make: Callable[[], Any]) -> Any:
    """What ``make()`` returned when it was last called for ``key``; an exception is not kept."""
    path = folder() / f"{key}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(found))
    fresh.replace(path)
    return found

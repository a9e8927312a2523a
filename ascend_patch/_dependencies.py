"""What the shim itself needs to be installed."""

from __future__ import annotations

import importlib

NAMES = ("wrapt", "packaging")


def missing() -> str:
    """What cannot be imported, as a sentence; empty where nothing is missing."""
    names = [name for name in NAMES if not _importable(name)]
    if not names:
        return ""
    return f"{' and '.join(names)} is missing; `pip install {' '.join(names)}`; vLLM runs as it was"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True

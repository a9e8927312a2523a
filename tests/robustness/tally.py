"""Counts what hostile tests tried, so that docs/robustness.md can say it."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "ASCEND_PATCH_TALLY"


def tally(what: str, *, tried: int, unit: str, seed: int | None = None, note: str = "") -> None:
    """Print what was tried, and append it to the file that ASCEND_PATCH_TALLY names.

    Called at the end of a test, after its assertions: what is counted was lost nowhere.

    Args:
        what: What was attacked and how, for example `status reader: malformed files`.
        tried: How many inputs or steps.
        unit: What one of them is, in the plural: `files`, `messages`, `steps`.
        seed: The seed of random inputs.
        note: A measured figure with its unit, for example `largest growth 0.3 MiB`.
    """
    entry = {"what": what, "tried": tried, "unit": unit, "seed": seed, "note": note}
    print(f"tried {tried} {unit} ({what}){': ' if note else ''}{note}")
    path = os.environ.get(VARIABLE)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

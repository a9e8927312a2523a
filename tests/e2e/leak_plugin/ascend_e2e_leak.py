"""Leaks on demand, in each process of a running server: what scripts/soak must notice.

A vLLM plugin (this folder goes on PYTHONPATH). A thread of its own reads the file that
E2E_LEAK_FILE names five times a second and keeps as many bytes a second as that says; it touches
nothing of vLLM or the shim, so that what is measured while the file is empty is theirs alone.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

PERIOD = 0.2
_kept: list[bytes] = []
_pids: set[int] = set()


def install() -> None:
    file = os.environ.get("E2E_LEAK_FILE")
    # vLLM loads plugins more than once, and forks: one thread for each process.
    if file and os.getpid() not in _pids:
        _pids.add(os.getpid())
        threading.Thread(target=leak, args=(Path(file),), name="leak", daemon=True).start()


def leak(file: Path) -> None:
    while True:
        time.sleep(PERIOD)
        try:
            rate = int(file.read_text() or 0)
        except (OSError, ValueError):
            continue
        if rate:
            # Not zeros: pages that nobody has written are not resident.
            _kept.append(b"x" * int(rate * PERIOD))

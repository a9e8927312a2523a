"""A request of a pair of MooncakeConnectorV1's ranks; import it after `ascend_kv`."""

from __future__ import annotations

import logging
from typing import Any

from ascend_kv import Pair

LOCAL, REMOTE = [3, 1, 5], [5, 6, 2]
LINES: list[str] = []


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LINES.append(record.getMessage())


logging.getLogger("vllm.ascend_patch.kv").addHandler(_Lines())


def pulled(pair: Pair, request: str, **given: Any) -> dict:
    """A request of `pair`: what both sides heard, what is in the cache, and what was logged."""
    del LINES[:]
    pair.offer(request)
    try:
        heard: Any = pair.pull(request, LOCAL, REMOTE, **given)
    except Exception as error:
        return {"raised": type(error).__name__}
    return {
        "heard": heard,
        "right": pair.right(LOCAL, REMOTE),
        "freed": pair.freed(request, 2.0),
        "lines": list(LINES),
    }

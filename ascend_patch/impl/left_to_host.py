"""Counts what an applied patch leaves to the host's own code in a running server, by reason.

A patch that is applied may still leave a case to the host because no kernel takes it; where the
host is wrong there, its fault persists. The state of the patch says so, with the reason and how
often: a dictionary look-up and an addition for each call that is left, and nothing for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from ascend_patch._calls import LEFT
from ascend_patch._log import get_logger

logger = get_logger(__name__)

# Reasons that are told apart for each patch; what comes after shares one.
MOST_REASONS = 24
OTHERS = "further reasons, which are in the log"
_counters: dict[tuple[str, str], Callable[[], None]] = {}
_logged: set[tuple[str, str]] = set()


def count(patch: str, reason: str) -> None:
    """Count a call that the host's own code computes; the first of each reason is logged.

    Args:
        patch: Its id.
        reason: A clause without a full stop, of which there are few in a process: what was found,
            and what the host does.
    """
    counted = _counters.get((patch, reason))
    if counted is None:
        counted = _first(patch, reason)
    counted()


def count_traced(patch: str, reason: str) -> None:
    """The same from code that torch.compile traces: it leaves nothing in a graph.

    While it is traced the reason is recorded once; an eager call is counted.
    """
    if is_compiling():
        _note_while_tracing(patch, reason)
    else:
        count(patch, reason)


def _noted_while_tracing(patch: str, reason: str) -> bool:
    reason = f"{reason} (in compiled code, whose calls are not counted)"
    if (patch, reason) not in _counters:
        count(patch, reason)
    return True


# Runs while Dynamo traces, and leaves nothing in the graph.
_note_while_tracing: Any = torch.compiler.assume_constant_result(_noted_while_tracing)


def _first(patch: str, reason: str) -> Callable[[], None]:
    from ascend_patch import _runtime

    state = _runtime.current().state
    if sum(known == patch for known, _ in _counters) >= MOST_REASONS:
        if (patch, reason) not in _logged and len(_logged) < 10 * MOST_REASONS:
            _logged.add((patch, reason))
            logger.warning("%s leaves a case to the host: %s", patch, reason)
        return _counters.setdefault((patch, OTHERS), state.counters.counter(_name(patch, OTHERS)))
    counted = state.counters.counter(_name(patch, reason))
    _counters[patch, reason] = counted
    logger.warning("%s leaves a case to the host: %s", patch, reason)
    state.write()
    return counted


def _name(patch: str, reason: str) -> str:
    return f"{LEFT}{patch}: {reason}"

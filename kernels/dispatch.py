"""Which implementation serves an operator on a device, and who is told that it ran.

An implementation comes with a verifier, ``supports(...) -> (ok, reason)``. A rejection is data, not
an exception: it is logged once per reason and returned to the caller, and the next candidate is
asked. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ascend_patch._log import get_logger

logger = get_logger(__name__)

ANY_DEVICE = "*"

Verifier = Callable[..., tuple[bool, str]]
Observer = Callable[[str], None]


def always(*_args: object, **_kwargs: object) -> tuple[bool, str]:
    """The verifier of an implementation without limits of its own, such as a torch reference."""
    return True, ""


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    ``supports`` takes the arguments that ``run`` takes and only looks at shapes, strides, dtypes
    and options, never at device memory. Its reason names the limit that was met ("head_size must
    be a multiple of 16"), not this call's sizes, so that a log line per reason stays one line.
    Of several implementations the one with the highest ``priority`` is asked first.
    """

    name: str
    run: Callable[..., Any]
    supports: Verifier = always
    priority: int = 0


@dataclass(frozen=True)
class Choice:
    """What ``select`` found: an implementation or None, and why others were turned down."""

    implementation: Implementation | None
    reason: str = ""


_lock = threading.Lock()
# Values are replaced, never mutated: readers take no lock.
_table: dict[tuple[str, str], tuple[Implementation, ...]] = {}
_logged: set[tuple[str, str, str, str]] = set()
_observer: Observer | None = None


class _Restriction(threading.local):
    """The only implementation that ``select`` may pick in this thread; empty is any."""

    name = ""


_restriction = _Restriction()


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """In this thread, and for a while, no implementation but those called ``name``.

    ``only("reference")`` runs code that calls kernels without a kernel of ours in it.
    """
    before, _restriction.name = _restriction.name, name
    try:
        yield
    finally:
        _restriction.name = before


def register(operator: str, device: str, implementation: Implementation) -> None:
    """Offer ``implementation`` for ``operator`` on ``device`` (a torch device type or ANY_DEVICE).

    One with the same name takes its predecessor's place, so registering again is harmless.
    """
    with _lock:
        others = [i for i in _table.get((operator, device), ()) if i.name != implementation.name]
        ranked = sorted([*others, implementation], key=lambda i: -i.priority)
        _table[operator, device] = tuple(ranked)


def unregister(operator: str, device: str, name: str) -> None:
    """Withdraw the implementation called ``name``; unknown names are ignored."""
    with _lock:
        rest = tuple(i for i in _table.get((operator, device), ()) if i.name != name)
        _table[operator, device] = rest


def candidates(operator: str, device: str) -> tuple[Implementation, ...]:
    """The implementations in the order in which ``select`` asks them: the device's, then any's."""
    return _table.get((operator, device), ()) + _table.get((operator, ANY_DEVICE), ())


def select(operator: str, device: str, *args: Any, **kwargs: Any) -> Choice:
    """Pick the first candidate whose verifier accepts this call's arguments.

    Returns a Choice; its ``implementation`` is None if nobody takes the call, and its ``reason``
    then says, for each candidate, why not.
    """
    reasons: list[str] = []
    only_name = _restriction.name
    for implementation in candidates(operator, device):
        if only_name and implementation.name != only_name:
            continue
        ok, reason = implementation.supports(*args, **kwargs)
        if ok:
            return Choice(implementation, "; ".join(reasons))
        reasons.append(f"{implementation.name}: {reason}")
        _log_once(operator, device, implementation.name, reason)
    if not reasons:
        reasons.append(f"no implementation of {operator} is registered for device type {device!r}")
    return Choice(None, "; ".join(reasons))


def _log_once(operator: str, device: str, name: str, reason: str) -> None:
    key = (operator, device, name, reason)
    if key in _logged:
        return
    with _lock:
        if key in _logged:
            return
        _logged.add(key)
    logger.info("%s on %s: %s cannot take this call: %s", operator, device, name, reason)


def set_observer(observer: Observer | None) -> Observer | None:
    """Have ``observer(operator)`` called once for each operator that executes; None stops it.

    Operator bodies run as Python also inside compiled graphs, so those calls count too. A replayed
    device graph runs no Python and is not seen. The observer must be quick, thread-safe and must
    not raise. Returns the previous one, for its owner to restore.
    """
    global _observer
    with _lock:
        previous, _observer = _observer, observer
    return previous


def observe(operator: str) -> None:
    """Tell the observer, if there is one, that ``operator`` runs now."""
    observer = _observer
    if observer is not None:
        observer(operator)

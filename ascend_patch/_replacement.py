"""Ours, as what can stand in a target's place: it outlives a revert, and then steps aside."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ascend_patch._registry import Symbol


class SeamError(RuntimeError):
    """A target cannot be changed as planned; the message says what was found."""


class Switch:
    """Whether our code runs. It outlives a revert: whoever still holds ours gets the original."""

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = True


def load_replacement(text: str) -> Any:
    """Import `module:function` of ours."""
    symbol = Symbol.parse(text)
    return getattr(importlib.import_module(symbol.module), symbol.qualname)


def guarded(
    original: FunctionType,
    factory: Callable[[FunctionType], FunctionType],
    switch: Switch,
    count: Callable[[], None],
) -> FunctionType:
    """Ours as a plain function that torch.compile traces, with the original behind a switch.

    Raises:
        SeamError: The parameters differ, so that a caller of one could not call the other.
    """
    from torch.compiler import is_compiling

    replacement = factory(original)
    theirs, ours = (_parameters(function) for function in (original, replacement))
    if theirs != ours:
        raise SeamError(f"{original.__qualname__} takes {theirs}, our replacement takes {ours}")

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not switch.on:
            return original(*args, **kwargs)
        # Inside a graph there is nothing to count with; Dynamo drops the branch.
        if not is_compiling():
            count()
        return replacement(*args, **kwargs)

    assert isinstance(call, FunctionType)
    return call


def _parameters(function: FunctionType) -> str:
    """Parameters as written, `/` and `*` included, so that a caller of one can call the other."""
    given = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in given]))

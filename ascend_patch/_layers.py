"""Who else has wrapped a function: names the foreign layers around a host's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

# Decorators that hosts put on their own functions are theirs, not a stranger's.
AT_HOME = ("torch", "functools", "contextlib")


def layers(function: Any) -> Iterator[Any]:
    """The function and what it wraps, from the outside in."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)


def holds(function: Any, ours: Any) -> bool:
    """Whether `ours` is among the layers, in a wrapped attribute or in a closure."""
    for layer in layers(function):
        if layer is ours:
            return True
        for cell in getattr(layer, "__closure__", None) or ():
            try:
                if cell.cell_contents is ours:
                    return True
            except ValueError:  # the cell is still empty
                continue
    return False


def foreign(function: Any, module: str) -> str:
    """Names the outermost layer that is neither the host's own nor ours; empty if there is none.

    Args:
        function: What is found at the target, read without the descriptor protocol.
        module: The module that should have defined it.
    """
    home = (module.partition(".")[0], "ascend_patch", *AT_HOME)
    for layer in layers(function):
        if isinstance(layer, staticmethod | classmethod):
            continue
        if type(layer).__module__.partition(".")[0] == "wrapt" or hasattr(
            type(layer), "__wrapped__"
        ):
            wrapper = getattr(layer, "_self_wrapper", None)
            where = getattr(wrapper, "__module__", None) or type(layer).__module__
            if where.partition(".")[0] != "ascend_patch":
                return f"a wrapt wrapper of {where}"
        elif isinstance(layer, FunctionType):
            # functools.wraps copies __module__, but not the globals a function really has.
            where = layer.__globals__.get("__name__", "?")
            if where != module and where.partition(".")[0] not in home:
                return f"{layer.__code__.co_name} of {where}"
        elif type(layer).__module__.partition(".")[0] not in (*home, *sys.builtin_module_names):
            return f"a {type(layer).__qualname__} of {type(layer).__module__}"
    return ""

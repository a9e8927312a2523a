"""Who else has wrapped a function: names the foreign layers around a host's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial, partialmethod
from types import FunctionType, MethodType
from typing import Any

from ascend_patch import _peers

# Decorators that hosts put on their own functions are theirs, not a stranger's.
AT_HOME = ("torch", "functools", "contextlib")
# `type(x)` is asked throughout and never isinstance: a wrapt proxy passes for what it wraps.
DESCRIPTORS = (staticmethod, classmethod)


def layers(function: Any) -> Iterator[Any]:
    """The function and what it wraps, from the outside in."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        if type(function) in (partial, partialmethod):
            function = function.func
            continue
        inner = "__func__" if type(function) in (*DESCRIPTORS, MethodType) else "__wrapped__"
        function = getattr(function, inner, None)


def holds(function: Any, ours: Any) -> bool:
    """Whether `ours` is among the layers: in a wrapped attribute, or in a closure, at any depth."""
    # A stranger who took `owner.name` holds the function, and never the descriptor it was in.
    core = ours.__func__ if type(ours) in DESCRIPTORS else ours
    # What wrapt gives for `owner.name` is bound, and knows what it was bound from.
    return any(
        layer is ours or layer is core or getattr(layer, "_self_parent", None) is ours
        for layer in reachable(function)
    )


def reachable(function: Any) -> Iterator[Any]:
    """The layers of a function, and those of the functions that their closures hold."""
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        for layer in layers(waiting.pop()):
            yield layer
            if id(layer) in seen:
                break
            seen.add(id(layer))
            for cell in getattr(layer, "__closure__", None) or ():
                try:
                    held = cell.cell_contents
                except ValueError:  # the cell is still empty
                    continue
                if type(held) in (FunctionType, MethodType, *DESCRIPTORS) or _is_proxy(held):
                    waiting.append(held)


def innermost_proxy(function: Any) -> Any:
    """The wrapt proxy that holds what is no proxy; None where the outermost layer is none."""
    proxy = None
    while type(function) not in DESCRIPTORS and _is_proxy(function):
        proxy, function = function, function.__wrapped__
    return proxy


def foreign(function: Any, *modules: str) -> str:
    """Names the outermost layer that is neither the host's own nor ours; empty if there is none.

    With the distribution that it comes from, where it comes from one.

    Args:
        function: What is found at the target, read without the descriptor protocol.
        modules: The modules that may have defined it.
    """
    home = (*(module.partition(".")[0] for module in modules), "ascend_patch", *AT_HOME)
    for layer in layers(function):
        if type(layer) in DESCRIPTORS:
            continue
        if _is_proxy(layer):
            wrapper = getattr(layer, "_self_wrapper", None)
            where = getattr(wrapper, "__module__", None) or type(layer).__module__
            if where.partition(".")[0] != "ascend_patch":
                return f"a wrapt wrapper of {where}{_origin(where, wrapper)}"
        elif type(layer) is FunctionType:
            # functools.wraps copies __module__, but not the globals a function really has.
            where = layer.__globals__.get("__name__", "?")
            if where not in modules and where.partition(".")[0] not in home:
                return f"{layer.__code__.co_name} of {where}{_origin(where, layer)}"
        elif type(layer).__module__.partition(".")[0] not in (*home, *sys.builtin_module_names):
            where = type(layer).__module__
            return f"a {type(layer).__qualname__} of {where}{_peers.from_distribution(where)}"
    return ""


def _origin(module: str, function: Any) -> str:
    namespace = getattr(function, "__globals__", {})
    return _peers.from_distribution(module, namespace.get("__file__"))


def _is_proxy(function: Any) -> bool:
    # The C types of some wrapt releases say that their module is `_wrappers`.
    kind = type(function)
    return kind.__module__.partition(".")[0] == "wrapt" or hasattr(kind, "__wrapped__")

"""Layers that were built before their class was changed, and kept a method of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from ascend_patch import _layers, _peers
from ascend_patch._finder import Finder


def keepers(model: Any, original: Any) -> Iterator[str]:
    """The names of a model's layers that hold a method which is called past the class.

    vLLM's custom operators keep the bound method that they will run (`_forward_method`).

    Args:
        model: A torch module; one of another kind has no layers that can be looked at.
        original: The function that was in the class when they were built.
    """
    named_modules = getattr(model, "named_modules", None)
    if named_modules is None:
        return
    for name, layer in named_modules():
        for attribute, value in vars(layer).items():
            if _leads_to(value, original):
                yield f"{name or type(layer).__name__}.{attribute}"
                break


def _leads_to(value: Any, original: Any) -> bool:
    """Whether calling a value runs the original: bound, or compiled by torch."""
    compiled = getattr(value, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        value = compiled
    if type(value) not in (FunctionType, MethodType):
        return False
    return any(layer is original for layer in _layers.layers(value))


def sentence(kept: list[str], module: str, finder: Finder) -> str:
    """What was found, why, and what to do.

    Args:
        kept: Names that `keepers` gave, at least one.
        module: Of the target.
        finder: The shim's, to see which others come before it.
    """
    shown = kept[0] + (f" and {len(kept) - 1} more" if len(kept) > 1 else "")
    ahead = sys.meta_path[: sys.meta_path.index(finder)] if finder in sys.meta_path else []
    modules = dict.fromkeys(_module_of(other) for other in ahead)
    before = " and ".join(f"{name}{_peers.from_distribution(name)}" for name in modules)
    cause = f", by a finder of {before} that comes first in sys.meta_path" if before else ""
    return (
        f"applied late: {module} had been imported before{cause}, and {shown} keep the original "
        "that they were built with. Leave that import or finder out, or let it come after "
        "ascend-patch, and restart"
    )


def _module_of(finder: Any) -> str:
    kind = finder if isinstance(finder, type) else type(finder)
    return str(getattr(kind, "__module__", "?"))

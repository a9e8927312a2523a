"""Ours, as what can stand in a target's place: it outlives a revert, and then steps aside."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ascend_patch._registry import NOTHING, ORIGINAL, REFERENCE, Symbol, Target

if TYPE_CHECKING:
    from ascend_patch._verifier import PatchVerifier


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


def around(
    original: Any,
    target: Target,
    switch: Switch,
    count: Callable[[], None],
    verifier: PatchVerifier | None = None,
) -> Any:
    """A host seam: ours as a wrapt wrapper around what is there."""
    from ascend_patch._wrappers import wrapper_of

    replacement = load_replacement(target.replacement)

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        count()
        return replacement(wrapped, instance, args, kwargs)

    if verifier is None:
        return wrapper_of(original, wrapper, lambda: switch.on)
    from ascend_patch import _compare

    def compared(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        def ours(*args: Any, **kwargs: Any) -> Any:
            return wrapper(wrapped, instance, args, kwargs)

        oracle = oracle_of(wrapped, target, ours)
        if verifier.stand_in:
            return (oracle or wrapped)(*args, **kwargs)
        if oracle is None or not _compare.is_due(verifier, args, kwargs):
            return ours(*args, **kwargs)
        return _compare.compare(verifier, target, wrapped, oracle, ours, args, kwargs)

    return wrapper_of(original, compared, lambda: switch.on and verifier.stand_in != ORIGINAL)


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

    replacement = _of_same_parameters(original, factory)

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


def verified(
    original: FunctionType,
    target: Target,
    switch: Switch,
    count: Callable[[], None],
    verifier: PatchVerifier,
) -> FunctionType:
    """What `guarded` makes of a target, and the comparison with the original beside it.

    Raises:
        SeamError: As `guarded` does; also for a target whose oracle takes other parameters.
    """
    import torch
    from torch.compiler import is_compiling

    from ascend_patch import _compare

    replacement = _of_same_parameters(original, load_replacement(target.replacement))
    oracle = oracle_of(original, target, replacement)

    def note_compiled() -> bool:
        verifier.compiled = True
        return True

    # Runs while Dynamo traces, and leaves nothing in the graph.
    traced: Any = torch.compiler.assume_constant_result(note_compiled)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not switch.on:
            return original(*args, **kwargs)
        if is_compiling():
            traced()
            return replacement(*args, **kwargs)
        if verifier.stand_in:
            use_oracle = oracle is not None and verifier.stand_in != ORIGINAL
            return (oracle if use_oracle else original)(*args, **kwargs)  # type: ignore[misc]
        count()
        if oracle is None or not _compare.is_due(verifier, args, kwargs):
            return replacement(*args, **kwargs)
        return _compare.compare(verifier, target, original, oracle, replacement, args, kwargs)

    assert isinstance(call, FunctionType)
    return call


def oracle_of(
    original: Callable[..., Any], target: Target, ours: Callable[..., Any]
) -> Callable[..., Any] | None:
    """What ours is compared with; None where it is not compared.

    Raises:
        SeamError: It takes other parameters than the original.
    """
    kind = target.oracle or (NOTHING if target.seam == "host" else ORIGINAL)
    if kind == NOTHING:
        return None
    if kind == ORIGINAL:
        return original
    if kind == REFERENCE:
        return without_kernels(ours)
    factory = load_replacement(kind)
    if isinstance(original, FunctionType):
        return _of_same_parameters(original, factory)
    found: Callable[..., Any] = factory(original)
    return found


def without_kernels(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, with the torch reference of every kernel that it calls."""
    from ascend_patch.kernels import dispatch

    def reference(*args: Any, **kwargs: Any) -> Any:
        with dispatch.only("reference"):
            return ours(*args, **kwargs)

    return reference


def _of_same_parameters(
    original: FunctionType, factory: Callable[[FunctionType], FunctionType]
) -> FunctionType:
    replacement = factory(original)
    theirs, ours = (_parameters(function) for function in (original, replacement))
    if theirs != ours:
        raise SeamError(f"{original.__qualname__} takes {theirs}, our replacement takes {ours}")
    return replacement


def _parameters(function: FunctionType) -> str:
    """Parameters as written, `/` and `*` included, so that a caller of one can call the other."""
    given = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in given]))

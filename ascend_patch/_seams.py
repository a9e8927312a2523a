"""How a target is changed, and given back: one class a kind of seam."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from ascend_patch import _layers
from ascend_patch._registry import Symbol, Target

_MISSING = object()


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


class Installation:
    """One target, changed. `revert` gives it back; `found` says what is there now."""

    note = ""

    def __init__(self, target: Target, count: Callable[[], None]) -> None:
        self.target = target
        self.switch = Switch()
        self._count = count

    def install(self) -> None:
        """Change the target.

        Raises:
            SeamError: What is there is not what was planned; nothing was changed.
        """
        raise NotImplementedError

    def revert(self) -> None:
        """Give the target back, also where somebody wrapped ours in the meantime."""
        raise NotImplementedError

    def found(self) -> str:
        """Empty if what was installed is what is there; otherwise what is there, as a sentence."""
        return ""


class AttributeInstallation(Installation):
    """Host and traced seams: an attribute of a class or of a module."""

    def install(self) -> None:
        symbol = Symbol.parse(self.target.symbol)
        self._owner, self._name = _owner(symbol)
        self._had_own = self._name in vars(self._owner)
        self._raw = inspect.getattr_static(self._owner, self._name)
        foreign = _layers.foreign(self._raw, symbol.module)
        if self.target.seam == "traced":
            if foreign:
                raise SeamError(
                    f"{symbol.qualname} is already replaced by {foreign}; it was left alone"
                )
            self._ours = self._traced()
        else:
            self.note = f"{foreign} had wrapped it before" if foreign else ""
            self._ours = self._wrapped()
        self._aliases: list[tuple[dict[str, Any], str]] = []
        setattr(self._owner, self._name, self._ours)
        if isinstance(self._owner, ModuleType):
            self._aliases = _rebind(self._raw, self._ours)

    def revert(self) -> None:
        self.switch.on = False
        if vars(self._owner).get(self._name, _MISSING) is self._ours:
            if self._had_own:
                setattr(self._owner, self._name, self._raw)
            else:
                delattr(self._owner, self._name)
        for namespace, name in self._aliases:
            if namespace.get(name) is self._ours:
                namespace[name] = self._raw
        self._aliases = []

    def resume(self) -> bool:
        """After a revert: switch ours on again if a foreign wrapper still holds it."""
        current = vars(self._owner).get(self._name)
        if current is None or not _layers.holds(current, self._ours):
            return False
        self.switch.on = True
        return True

    def found(self) -> str:
        current = inspect.getattr_static(self._owner, self._name, None)
        if current is self._ours:
            return ""
        other = _layers.foreign(current, Symbol.parse(self.target.symbol).module) or "the original"
        if _layers.holds(current, self._ours):
            return f"wrapped by {other}"
        return f"replaced by {other} after we had applied"

    def _wrapped(self) -> Any:
        import wrapt

        replacement, count, switch = (
            load_replacement(self.target.replacement),
            self._count,
            self.switch,
        )

        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            count()
            return replacement(wrapped, instance, args, kwargs)

        return wrapt.FunctionWrapper(self._raw, wrapper, enabled=lambda: switch.on)

    def _traced(self) -> Any:
        original = getattr(self._raw, "__func__", self._raw)
        if not isinstance(original, FunctionType):
            raise SeamError(
                f"{self.target.symbol} is a {type(original).__name__}; a traced seam needs a function"
            )
        ours = guarded(
            original, load_replacement(self.target.replacement), self.switch, self._count
        )
        return type(self._raw)(ours) if isinstance(self._raw, staticmethod | classmethod) else ours


class OperatorInstallation(Installation):
    """A registered operator, re-implemented under its own name and schema."""

    def install(self) -> None:
        import torch

        namespace, _, name = self.target.operator.partition("::")
        symbol = Symbol.parse(self.target.symbol)
        owner, attribute = _owner(symbol)
        if not hasattr(getattr(torch.ops, namespace), name):
            raise SeamError(f"the operator {self.target.operator} is not registered")
        if "allow_override" not in inspect.signature(torch.library.Library.impl).parameters:
            raise SeamError(
                f"torch {torch.__version__} cannot override an operator; 2.7 or later can"
            )
        original = inspect.unwrap(getattr(owner, attribute))
        ours = guarded(
            original, load_replacement(self.target.replacement), self.switch, self._count
        )
        # Ours lives as long as this object: destroying the library uncovers the host's kernel.
        self._library: Any = torch.library.Library(namespace, "IMPL")
        try:
            # Its default differs between torch releases, so it is always given.
            self._library.impl(name, ours, self.target.dispatch_key, allow_override=True)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        self.switch.on = False
        library, self._library = self._library, None
        if library is not None:
            library._destroy()


def make(target: Target, count: Callable[[], None]) -> Installation:
    """The installation for a target's kind of seam, not yet installed."""
    kind = OperatorInstallation if target.seam == "operator" else AttributeInstallation
    return kind(target, count)


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
        raise SeamError(
            f"{original.__qualname__} takes ({', '.join(theirs)}), "
            f"our replacement takes ({', '.join(ours)})"
        )

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


def _parameters(function: FunctionType) -> list[str]:
    kinds = inspect.Parameter
    stars: dict[object, str] = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}
    return [
        stars.get(p.kind, "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in inspect.signature(function).parameters.values()
    ]


def _owner(symbol: Symbol) -> tuple[Any, str]:
    owner: Any = sys.modules[symbol.module]
    *path, name = symbol.qualname.split(".")
    for part in path:
        owner = inspect.getattr_static(owner, part, _MISSING)
        if owner is _MISSING:
            raise SeamError(f"{symbol.module} has no {part}, which {symbol.qualname} is part of")
    if inspect.getattr_static(owner, name, _MISSING) is _MISSING:
        raise SeamError(f"{symbol.module} has no {symbol.qualname}")
    return owner, name


def _rebind(original: Any, ours: Any) -> list[tuple[dict[str, Any], str]]:
    """Rebind what other modules had imported by name, by identity.

    Over `__dict__` and never by attribute access, which would trigger lazy modules.
    """
    rebound = []
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        namespace = object.__getattribute__(module, "__dict__")
        for name, value in list(namespace.items()):
            if value is original:
                namespace[name] = ours
                rebound.append((namespace, name))
    return rebound

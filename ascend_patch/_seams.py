"""How a target is changed, and given back: one class a kind of seam."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ascend_patch import _layers, _peers
from ascend_patch._installation import HIDDEN, MISSING, Installation, owner_of
from ascend_patch._operator_seam import OperatorInstallation
from ascend_patch._registry import Symbol, Target
from ascend_patch._replacement import SeamError, around

if TYPE_CHECKING:
    from ascend_patch._verifier import PatchVerifier


class AttributeInstallation(Installation):
    """Host and traced seams: an attribute of a class or of a module."""

    def prepare(self) -> None:
        symbol = self.target.place
        self._owner, self._name = owner_of(symbol)
        self._had_own = self._name in vars(self._owner)
        self._raw = inspect.getattr_static(self._owner, self._name)
        foreign = self._foreign(self._raw)
        self.note = f"{foreign} had wrapped it before" if foreign else ""
        # What ours takes the place of, and what that is held by: the owner or a foreign wrapper.
        self._core, self._holder = self._raw, None
        if self.target.seam == "host":
            self._ours = self._wrapped()
            return
        if foreign:
            # A compiled forward walks through wrapt's proxies, so ours has to lie beneath them.
            self._holder = _layers.innermost_proxy(self._raw) if self._had_own else None
            self._core = self._holder.__wrapped__ if self._holder is not None else self._raw
            if self._foreign(self._core):
                raise SeamError(
                    f"{symbol.qualname} is already replaced by {foreign}; it was left alone. Let "
                    "that come after ascend-patch, or leave one of the two out"
                )
        self._ours = self._traced()

    def install(self) -> None:
        # An inherited attribute may have changed: the base class can be a target of the same patch.
        own = vars(self._owner).get(self._name, MISSING)
        if own is not (self._raw if self._had_own else MISSING):
            raise SeamError(f"{self.target.symbol} changed while it was being replaced")
        if self._holder is not None and self._holder.__wrapped__ is not self._core:
            raise SeamError(f"what {self.target.symbol} is wrapped in changed meanwhile")
        try:
            if self._holder is not None:
                self._holder.__wrapped__ = self._ours
            else:
                setattr(self._owner, self._name, self._ours)
            self._rebind(self._core, self._ours)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        self.switch.on = False
        if self._holder is not None and self._holder.__wrapped__ is self._ours:
            self._holder.__wrapped__ = self._core
        # Also where who had wrapped it took the wrapper off since.
        if vars(self._owner).get(self._name, MISSING) is self._ours:
            if self._had_own:
                setattr(self._owner, self._name, self._core)
            else:
                delattr(self._owner, self._name)
        # Also where a module has imported ours by name since.
        self._rebind(self._ours, self._core)

    def resume(self) -> bool:
        if not self.in_place():
            return False
        self.switch.on = True
        self._rebind(self._core, self._ours)
        return True

    def in_place(self) -> bool:
        try:
            owner, name = owner_of(self.target.place)
        except (SeamError, KeyError):
            return False
        # After a reload or a second import the class of that name is another one.
        return owner is self._owner and _layers.holds(vars(owner).get(name), self._ours)

    def _rebind(self, old: Any, new: Any) -> None:
        if isinstance(self._owner, ModuleType):
            _rebind(old, new)

    def _foreign(self, function: Any) -> str:
        # Where another module of the host assigns the target, that one is at home there too.
        modules = (Symbol.parse(self.target.symbol).module, self.target.place.module)
        return _layers.foreign(function, *modules, self.target.module)

    def found(self) -> str:
        try:
            owner, _ = owner_of(self.target.place)
        except SeamError as error:
            return f"gone: {error}"
        current = inspect.getattr_static(owner, self._name)
        held = _layers.holds(current, self._ours)
        if current is self._ours or (held and current is self._raw):
            return ""
        if owner is not self._owner:
            return "" if held else f"{_instead_of(owner)} after we had applied{HIDDEN}"
        other = self._foreign(current) or "the original"
        if held:
            return f"wrapped by {other}"
        return f"replaced by {other} after we had applied{HIDDEN}"

    def originals(self) -> tuple[Any, ...]:
        return (getattr(self._core, "__func__", self._core),)

    def hidden(self) -> bool:
        try:
            owner, _ = owner_of(self.target.place)
        except SeamError:
            return True
        return not _layers.holds(inspect.getattr_static(owner, self._name), self._ours)

    def _wrapped(self) -> Any:
        if not _is_callable(self._raw):
            raise SeamError(
                f"{self.target.symbol} is a {type(self._raw).__name__}; a host seam needs a "
                "function or a method"
            )
        return around(self._raw, self.target, self.switch, self._count, self._verifier)

    def _traced(self) -> Any:
        original = getattr(self._core, "__func__", self._core)
        if type(original) is not FunctionType:
            raise SeamError(
                f"{self.target.symbol} is a {type(original).__name__}; a traced seam needs a "
                "function"
            )
        ours = self._plain(original)
        return type(self._core)(ours) if type(self._core) in _layers.DESCRIPTORS else ours


def make(
    target: Target, count: Callable[[], None], verifier: PatchVerifier | None = None
) -> Installation:
    """The installation for a target's kind of seam, not yet installed."""
    kind = OperatorInstallation if target.seam == "operator" else AttributeInstallation
    return kind(target, count, verifier)


def _is_callable(raw: Any) -> bool:
    if type(raw) in _layers.DESCRIPTORS:
        return True
    # A class keeps its identity: its methods are patched instead. A property is not called.
    return callable(raw) and not isinstance(raw, type)


def _instead_of(owner: Any) -> str:
    """Names the class, or the module, that has taken the place of the one that was changed."""
    if isinstance(owner, ModuleType):
        return "in a module that was imported again"
    where = f"{owner.__module__}.{owner.__qualname__}"
    return f"in a class that was replaced by {where}{_peers.from_distribution(owner.__module__)}"


def _rebind(old: Any, new: Any) -> None:
    """Rebind what modules had imported by name, by identity.

    Over `__dict__` and never by attribute access, which would trigger lazy modules.
    """
    for module in list(sys.modules.values()):
        if not issubclass(type(module), ModuleType):
            continue
        namespace = object.__getattribute__(module, "__dict__")
        for name, value in list(namespace.items()):
            if value is old:
                namespace[name] = new

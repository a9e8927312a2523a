"""What stands in a module's spec while the finder waits for the module to run."""

from __future__ import annotations

import _frozen_importlib
import sys
from _frozen_importlib import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from ascend_patch._finder import Finder


class Proxy:
    """Stands for a loader in a spec until the module runs; then the original takes its place again.

    So whoever reads `__loader__` later (inspect, linecache, importlib.resources) sees no stranger.
    """

    def __init__(self, finder: Finder, original: Any, name: str, spec: Any) -> None:
        self._ascend_finder = finder
        self._ascend_original = original
        self._ascend_name = name
        self._ascend_spec = spec

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_ascend_"):  # a copy in the making has no attributes yet
            raise AttributeError(name)
        return getattr(self._ascend_original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(spec.loader, SourceFileLoader) must answer as it does without us.
        return type(self._ascend_original)

    def __eq__(self, other: object) -> bool:
        return bool(self._ascend_original == getattr(other, "_ascend_original", other))

    def __hash__(self) -> int:
        return hash(self._ascend_original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A deep copy and a pickle are those of the original: a finder stays in its process.
        return self._ascend_original.__reduce_ex__(protocol)


class Loader(Proxy):
    """A loader with our callbacks around exec_module."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        original = self._ascend_original
        if not hasattr(original, "create_module"):
            # As importlib says it of such a loader.
            raise ImportError("loaders that define exec_module() must also define create_module()")
        # Once importlib has the module it is in sys.modules, and its submodules can be imported.
        finder, name = self._ascend_finder, self._ascend_name
        finder.guarded(name, finder.shut_gate, name, spec)
        try:
            module: ModuleType | None = original.create_module(spec)
        except BaseException:
            finder.guarded(name, finder.open_gate, name)
            raise
        return module

    def exec_module(self, module: ModuleType) -> None:
        finder, name = self._ascend_finder, self._ascend_name
        finder.guarded(name, self._ascend_withdraw, module)
        finder.guarded(name, self._ascend_enter, module)
        try:
            self._ascend_original.exec_module(module)
        finally:
            finder.guarded(name, finder.leave, name)
        finder.guarded(name, finder.run_after, name, module)

    def _ascend_withdraw(self, module: ModuleType) -> None:
        spec = values(module).get("__spec__") or self._ascend_spec
        if spec.loader is self:
            spec.loader = self._ascend_original
        if values(module).get("__loader__") is self:
            module.__loader__ = self._ascend_original

    def _ascend_enter(self, module: ModuleType) -> None:
        finder, name = self._ascend_finder, self._ascend_name
        # A lazy loader runs nothing yet: whoever uses the module first runs it.
        if is_lazy_loader(self._ascend_original):
            finder.open_gate(name)
        else:
            finder.enter(name, values(module).get("__spec__") or self._ascend_spec)


class LegacyLoader(Proxy):
    """The same for a loader of the protocol before exec_module, which has load_module only."""

    def load_module(self, fullname: str) -> ModuleType:
        finder, name, spec = self._ascend_finder, self._ascend_name, self._ascend_spec
        finder.guarded(name, self._ascend_withdraw, spec)
        finder.guarded(name, finder.enter, name, spec)
        try:
            module: ModuleType = self._ascend_original.load_module(fullname)
        finally:
            finder.guarded(name, finder.leave, name)
        finder.guarded(name, finder.run_after, name, module)
        return module

    def _ascend_withdraw(self, spec: Any) -> None:
        spec.loader = self._ascend_original


class InProgress(ModuleSpec):
    """The spec of a module that is half imported: says when importlib has finished with it."""

    # Declared for type checkers; importlib sets it.
    _initializing: bool

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.tell()

    def tell(self) -> None:
        """Call back, once, and be an ordinary spec again."""
        finders = self.__dict__.pop("_ascend_finders", None)
        if finders is None:
            return
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        # A failed import has taken the module out of sys.modules already.
        module = sys.modules.get(self.name)
        if module is not None and values(module).get("__spec__") is self:
            for finder in finders:
                finder.guarded(self.name, finder.run_after, self.name, module)


def values(module: object) -> dict[str, Any]:
    """A module's namespace, read so that a lazy module stays lazy."""
    try:
        values: dict[str, Any] = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return values


def execution(module: object) -> object:
    """What tells one execution of a module from the next: its spec."""
    return values(module).get("__spec__") or module


def is_lazy(module: object) -> bool:
    """Whether importlib.util.LazyLoader has not run the module yet."""
    util = sys.modules.get("importlib.util")
    return util is not None and type(module) is getattr(util, "_LazyModule", None)


def is_lazy_loader(loader: object) -> bool:
    """Whether a loader is importlib.util.LazyLoader."""
    util = sys.modules.get("importlib.util")
    return util is not None and type(loader) is getattr(util, "LazyLoader", None)


def find_by_module(finder: Any, fullname: str, path: Any) -> ModuleSpec | None:
    """What importlib does with a finder that has no `find_spec`: up to Python 3.11 it asks it."""
    legacy = getattr(_frozen_importlib, "_find_spec_legacy", None)
    found: ModuleSpec | None = legacy(finder, fullname, path) if legacy is not None else None
    return found

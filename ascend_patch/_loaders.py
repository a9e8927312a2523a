"""What stands in a module's spec while the finder waits for the module to run."""

from __future__ import annotations

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

    def __init__(self, finder: Finder, original: Any) -> None:
        self._ascend_finder = finder
        self._ascend_original = original

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
        create = getattr(self._ascend_original, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = self._ascend_original
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._ascend_original
        if spec is not None:
            self._ascend_finder.wait_at_gate(spec.name)
        with self._ascend_finder.running(spec):
            if spec is not None:
                self._ascend_finder.run_before(spec)
            self._ascend_original.exec_module(module)
        self._ascend_finder.run_after(module)


class LegacyLoader(Proxy):
    """The same for a loader of the protocol before exec_module, which has load_module only."""

    def __init__(self, finder: Finder, original: Any, spec: ModuleSpec) -> None:
        super().__init__(finder, original)
        self._ascend_spec = spec

    def load_module(self, fullname: str) -> ModuleType:
        spec = self._ascend_spec
        spec.loader = self._ascend_original
        with self._ascend_finder.running(spec):
            self._ascend_finder.run_before(spec)
            module: ModuleType = self._ascend_original.load_module(fullname)
        self._ascend_finder.run_after(module)
        return module


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
                finder.run_after(module)


class Running:
    """Notes for how long a spec's code runs under one of our loaders."""

    def __init__(self, noted: list[int], spec: object) -> None:
        self._noted = noted
        self._spec = id(spec)

    def __enter__(self) -> None:
        self._noted.append(self._spec)

    def __exit__(self, *_: object) -> None:
        self._noted.remove(self._spec)


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

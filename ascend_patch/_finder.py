"""A meta-path finder that calls back when a module is about to run and when it has run.

Ours instead of wrapt's post-import hooks, for three reasons: `import wrapt` costs about 100 ms in
every interpreter; its hooks fire on half-imported modules; a hook that raises makes the host's
import fail. Only modules that are already loaded when Python starts are used here.

The callbacks of one module run under that module's own import lock, so threads that import it at
once see it patched or wait.
"""

from __future__ import annotations

import sys
from _frozen_importlib import ModuleSpec
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType
    from typing import Any


class Watch:
    """What to call for one module.

    Args:
        before: Called with the module's spec right before its code runs, once per execution.
        after: Called with the module once its code has run, once per execution.
    """

    __slots__ = ("after", "before")

    def __init__(
        self,
        before: Callable[[ModuleSpec], None] | None = None,
        after: Callable[[ModuleType], None] | None = None,
    ) -> None:
        self.before = before
        self.after = after


class _Loader:
    """The original loader, with our callbacks around exec_module.

    It stands in a spec until the module runs; then the original takes its place again, so that
    whoever reads `__loader__` later (inspect, linecache, importlib.resources) sees no stranger.
    """

    def __init__(self, finder: Finder, original: Any) -> None:
        self._ascend_finder = finder
        self._ascend_original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ascend_original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(spec.loader, SourceFileLoader) must answer as it does without us.
        return type(self._ascend_original)

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
            self._ascend_finder.run_before(spec)
        self._ascend_original.exec_module(module)
        self._ascend_finder.run_after(module)


class _InProgress(ModuleSpec):
    """The spec of a module that is half imported: says when importlib has finished with it."""

    _ascend_finder: Finder

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_ascend_initializing", True))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_ascend_initializing"] = value
        if not value:
            # A failed import has taken the module out of sys.modules already.
            module = sys.modules.get(self.name)
            if module is not None and module.__spec__ is self:
                self._ascend_finder.run_after(module)


class Finder:
    """Watches modules by name; a name that nobody watches costs one dictionary look-up.

    Args:
        on_error: Called with (module name, exception) when a callback fails. The host's import
            goes on. Exceptions whose class has a true `ascend_patch_fatal` are raised instead.
    """

    def __init__(self, on_error: Callable[[str, BaseException], None]) -> None:
        self._watches: dict[str, list[Watch]] = {}
        self._searching: set[tuple[int, str]] = set()
        self._on_error = on_error

    def arm(self) -> None:
        """Stand first in sys.meta_path; calling it twice changes nothing."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def disarm(self) -> None:
        """Leave sys.meta_path; watches are kept for a later `arm`."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def watch(self, name: str, watch: Watch) -> bool:
        """Add a watch; a module that has already run is called back at once.

        A module that is being imported right now is called back when its code has finished.

        Returns:
            True if the module had run before, so that others may hold references into it.
        """
        self._watches.setdefault(name, []).append(watch)
        module = sys.modules.get(name)
        if module is None:
            return False
        spec = getattr(module, "__spec__", None)
        if spec is not None and getattr(spec, "_initializing", False):
            self._when_finished(spec)
            return False
        if watch.after is not None:
            self._call(name, watch.after, module)
        return True

    def unwatch(self, watches: Iterable[Watch]) -> None:
        """Forget these watches, wherever they are registered."""
        gone = set(map(id, watches))
        for name, entries in list(self._watches.items()):
            left = [watch for watch in entries if id(watch) not in gone]
            if left:
                self._watches[name] = left
            else:
                self._watches.pop(name, None)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._watches:
            return None
        # A finder behind us may ask importlib for the same name again: it gets no answer from us.
        searching = (get_ident(), fullname)
        if searching in self._searching:
            return None
        self._searching.add(searching)
        try:
            spec = self._find_behind_us(fullname, path, target)
        finally:
            self._searching.discard(searching)
        if spec is None:
            return None
        if spec.loader is None or not hasattr(spec.loader, "exec_module"):
            self._when_finished(spec)  # a namespace package, or a loader of the old protocol
        else:
            spec.loader = _Loader(self, spec.loader)  # type: ignore[assignment]
        return spec

    def _find_behind_us(self, fullname: str, path: Any, target: Any) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        start = finders.index(self) + 1 if self in finders else 0
        for finder in finders[start:]:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None

    def _when_finished(self, spec: ModuleSpec) -> None:
        if type(spec) is not ModuleSpec:
            # Not importlib's own class: leave it alone and let `sweep` find the module later.
            return
        spec.__dict__["_ascend_initializing"] = spec.__dict__.pop("_initializing", True)
        spec.__class__ = _InProgress
        spec._ascend_finder = self  # type: ignore[attr-defined]

    def run_before(self, spec: ModuleSpec) -> None:
        for watch in tuple(self._watches.get(spec.name, ())):
            if watch.before is not None:
                self._call(spec.name, watch.before, spec)

    def run_after(self, module: ModuleType) -> None:
        name = module.__name__
        for watch in tuple(self._watches.get(name, ())):
            if watch.after is not None:
                self._call(name, watch.after, module)

    def _call(self, name: str, callback: Callable[[Any], None], argument: Any) -> None:
        try:
            callback(argument)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or getattr(error, "ascend_patch_fatal", False):
                raise
            self._on_error(name, error)

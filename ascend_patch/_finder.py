"""A meta-path finder that calls back when a module is about to run and when it has run.

Ours instead of wrapt's post-import hooks, for three reasons: `import wrapt` costs about 100 ms in
every interpreter; its hooks fire on half-imported modules; a hook that raises makes the host's
import fail. Only modules that are already loaded when Python starts are used here.

The callbacks of one module run under that module's own import lock, so threads that import it at
once see it patched or wait. No lock of the finder is held while anything is imported.

What other finders and loaders do, raise and return reaches importlib as it would without this
finder; what goes wrong in the finder itself is told to `on_error`, and the import goes on.
"""

from __future__ import annotations

import sys
from _frozen_importlib import ModuleSpec
from _thread import RLock, get_ident

from ascend_patch._gates import Gates
from ascend_patch._guard import contain, ends_import
from ascend_patch._loaders import (
    InProgress,
    LegacyLoader,
    Loader,
    Proxy,
    execution,
    find_by_module,
    is_lazy,
    values,
)

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

    __slots__ = ("after", "before", "told")

    def __init__(
        self,
        before: Callable[[ModuleSpec], None] | None = None,
        after: Callable[[ModuleType], None] | None = None,
    ) -> None:
        self.before = before
        self.after = after
        # Per module name, the execution that `after` was last called for: its spec.
        self.told: dict[str, object] = {}


class Finder:
    """Watches modules by name; a name that nobody watches costs one dictionary look-up.

    Args:
        on_error: Called with (module name, exception) when a callback fails. The host's import
            goes on. Exceptions whose class has a true `ascend_patch_fatal` are raised instead.
    """

    def __init__(self, on_error: Callable[[str, BaseException], None]) -> None:
        self._watches: dict[str, list[Watch]] = {}
        self._searching: dict[tuple[int, str], object] = {}
        self._running: dict[str, object] = {}
        self._gates = Gates()
        self._shut = self._gates.shut_by_package
        self._on_error = on_error
        # Per thread, the callbacks that wait for `catch_up`.
        self._postponed: dict[int, list[tuple[str, Watch, ModuleType]]] = {}
        # Held for two dictionary operations, so that two threads do not both call back.
        self._telling = RLock()

    def arm(self) -> None:
        """Stand first in sys.meta_path; calling it twice changes nothing."""
        # By identity, here as everywhere: what else stands there may have an `__eq__` of its own.
        if id(self) not in map(id, sys.meta_path):
            sys.meta_path.insert(0, self)

    def disarm(self) -> None:
        """Leave sys.meta_path; watches are kept for a later `arm`."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

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
        spec: Any = values(module).get("__spec__")
        if self._runs(name, spec):
            return False  # our loader calls back when it has finished
        if is_lazy(module):
            self._stand_in(name, spec)
            return False
        if getattr(spec, "_initializing", False):
            self._when_finished(spec)
            if type(spec) is InProgress and not spec._initializing:
                spec.tell()  # another thread has finished it in between
            return False
        waiting = self._postponed.get(get_ident())
        if waiting is None:
            self._tell(name, watch, module)
        else:
            waiting.append((name, watch, module))
        return True

    def postpone(self) -> None:
        """From here on `watch` in this thread calls nothing back before `catch_up`."""
        self._postponed[get_ident()] = []

    def catch_up(self) -> None:
        """Make the calls that were postponed in this thread, and those that come later at once."""
        for name, watch, module in self._postponed.pop(get_ident(), ()):
            self._tell(name, watch, module)

    def watches(self) -> list[Watch]:
        """Every watch there is."""
        return [watch for watches in list(self._watches.values()) for watch in watches]

    def sweep(self) -> list[str]:
        """Call back for modules that came in past this finder.

        Another finder in front of it may bring them in, or a loader that is called directly.

        Returns:
            The names of these modules; others may hold references into them.
        """
        found = []
        for name, watches in list(self._watches.items()):
            module = sys.modules.get(name)
            spec = values(module).get("__spec__")
            if module is None or self._runs(name, spec) or is_lazy(module):
                continue
            if getattr(spec, "_initializing", False):
                continue
            missed = [w for w in watches if w.told.get(name) is not execution(module)]
            for watch in missed:
                self._tell(name, watch, module)
            if missed:
                found.append(name)
        return found

    def unwatch(self, watches: Iterable[Watch]) -> None:
        """Forget these watches, wherever they are registered."""
        gone = set(map(id, watches))
        for name, entries in list(self._watches.items()):
            self._watches[name] = [watch for watch in entries if id(watch) not in gone]
            if not self._watches[name]:
                del self._watches[name]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._watches and not self._shut:
            return None
        searching = (get_ident(), fullname)
        this = object()
        spec: ModuleSpec | None = None
        try:
            if not contain(fullname, self._begins, searching, this, on_error=self._on_error):
                return None
            # As importlib goes through the list: what a finder adds or removes counts at once.
            behind = id(self) not in map(id, sys.meta_path)
            for finder in sys.meta_path:
                if finder is self:
                    behind = True
                elif behind:
                    try:
                        find = finder.find_spec
                    except AttributeError:
                        spec = find_by_module(finder, fullname, path)
                    else:
                        spec = find(fullname, path, target)
                    if spec is not None:
                        break
        finally:
            if self._searching.get(searching) is this:
                del self._searching[searching]
        if spec is not None:
            contain(fullname, self._take, fullname, spec, on_error=self._on_error)
        return spec

    def _begins(self, searching: tuple[int, str], this: object) -> bool:
        name = searching[1]
        # Also every submodule of a package whose gate is shut: by then somebody may watch it.
        if name not in self._watches and self._gates.find(name) is None:
            return False
        # A finder behind us may ask importlib for the same name again: it gets no answer from us.
        return self._searching.setdefault(searching, this) is this

    def _take(self, fullname: str, spec: Any) -> None:
        try:
            if spec.loader is None:
                self._when_finished(spec)  # a namespace package
            else:
                self._stand_in(fullname, spec)
        except BaseException as error:
            # A spec that cannot be changed: what comes before its code comes now.
            if not ends_import(error):
                self.run_before(fullname, spec)
            raise

    def _stand_in(self, fullname: str, spec: Any) -> None:
        loader = spec.loader
        if issubclass(type(loader), Proxy) and loader._ascend_finder is self:
            return  # a finder that keeps its specs: this one has been through our hands
        kind = Loader if hasattr(loader, "exec_module") else LegacyLoader
        spec.loader = kind(self, loader, fullname, spec)

    def _when_finished(self, spec: Any) -> None:
        if type(spec) is InProgress:
            finders = spec.__dict__.setdefault("_ascend_finders", [])
            if self not in finders:
                finders.append(self)
        elif type(spec) is ModuleSpec:
            spec.__dict__["_ascend_finders"] = [self]
            spec.__class__ = InProgress
        # Otherwise it is not importlib's own class: `sweep` finds the module later.

    def guarded(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a part of the finder from within an import; a fault in it ends no import."""
        contain(name, function, *arguments, on_error=self._on_error)

    def enter(self, name: str, spec: ModuleSpec) -> None:
        """The code of this spec's module runs next, under one of our loaders."""
        self._gates.wait(name)
        self._running[name] = spec
        self.run_before(name, spec)

    def leave(self, name: str) -> None:
        """The code of this module has ended, one way or the other."""
        self._running.pop(name, None)

    def _runs(self, name: str, spec: object) -> bool:
        return name in self._running and self._running[name] is spec

    def shut_gate(self, name: str, spec: ModuleSpec) -> None:
        """Let no other thread import a submodule before this package's `before` has returned."""
        if any(watch.before is not None for watch in self._watches.get(name, ())):
            self._gates.shut(name, spec)

    def open_gate(self, name: str) -> None:
        self._gates.open(name)

    def run_before(self, name: str, spec: ModuleSpec) -> None:
        """Call what is to be called before the code of a module runs."""
        watches = [watch for watch in self._watches.get(name, ()) if watch.before is not None]
        if not watches:
            return
        self._gates.shut(name, spec)
        failed = True
        try:
            for watch in watches:
                if watch.before is not None:
                    contain(name, watch.before, spec, on_error=self._on_error)
            failed = False
        finally:
            self._gates.open(name, failed)

    def run_after(self, name: str, module: ModuleType) -> None:
        """Call what is to be called once the code of a module has run."""
        # A module may have put another object in its own place.
        module = sys.modules.get(name, module)
        if is_lazy(module):
            self._stand_in(name, values(module)["__spec__"])
            return
        for watch in tuple(self._watches.get(name, ())):
            self._tell(name, watch, module)

    def _tell(self, name: str, watch: Watch, module: ModuleType) -> None:
        with self._telling:
            # One that was added by a callback, or at the same moment, may have been told.
            if watch.told.get(name) is execution(module):
                return
            watch.told[name] = execution(module)
        if not contain(name, self._call, watch, module, on_error=self._on_error):
            watch.told.pop(name, None)  # the next sweep tries again

    def _call(self, watch: Watch, module: ModuleType) -> bool:
        if watch.after is not None:
            watch.after(module)
        return True

    def after_fork(self) -> None:
        """In a forked child only the thread that forked lives on; others do nothing any more."""
        self._telling = RLock()
        self._searching = {k: v for k, v in self._searching.items() if k[0] == get_ident()}
        self._gates.after_fork()

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
from _thread import LockType, allocate_lock, get_ident

from ascend_patch._loaders import (
    InProgress,
    LegacyLoader,
    Loader,
    Proxy,
    Running,
    execution,
    is_lazy,
    values,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType
    from typing import Any

# How long an import waits for what another thread does before its package's code.
GATE_SECONDS = 10.0


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
        self._searching: set[tuple[int, str]] = set()
        self._running: list[int] = []
        self._gates: dict[str, tuple[int, LockType]] = {}
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
        spec: Any = values(module).get("__spec__")
        if id(spec) in self._running:
            return False  # our loader calls back when it has finished
        if is_lazy(module):
            self._stand_in(spec)
            return False
        if getattr(spec, "_initializing", False):
            self._when_finished(spec)
            if type(spec) is InProgress and not spec._initializing:
                spec.tell()  # another thread has finished it in between
            return False
        self._tell(name, watch, module)
        return True

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
            if module is None or id(spec) in self._running or is_lazy(module):
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
            left = [watch for watch in entries if id(watch) not in gone]
            if left:
                self._watches[name] = left
            else:
                self._watches.pop(name, None)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._watches and not (self._gates and self._gate(fullname)):
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
        if spec.loader is None:
            self._when_finished(spec)  # a namespace package
        else:
            self._stand_in(spec)
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

    def _stand_in(self, spec: Any) -> None:
        loader = spec.loader
        if issubclass(type(loader), Proxy) and loader._ascend_finder is self:
            return  # a finder that keeps its specs: this one has been through our hands
        legacy = not hasattr(loader, "exec_module")
        spec.loader = LegacyLoader(self, loader, spec) if legacy else Loader(self, loader)

    def _when_finished(self, spec: Any) -> None:
        if type(spec) is InProgress:
            finders = spec.__dict__.setdefault("_ascend_finders", [])
            if self not in finders:
                finders.append(self)
        elif type(spec) is ModuleSpec:
            spec.__dict__["_ascend_finders"] = [self]
            spec.__class__ = InProgress
        # Otherwise it is not importlib's own class: `sweep` finds the module later.

    def running(self, spec: object) -> Running:
        """For `with`: the code of this spec's module runs under one of our loaders."""
        return Running(self._running, spec)

    def run_before(self, spec: ModuleSpec) -> None:
        watches = [watch for watch in self._watches.get(spec.name, ()) if watch.before is not None]
        if not watches:
            return
        # Importing a submodule does not wait for a package that another thread is importing. What
        # the callbacks decide to watch in it must not slip by in the meantime.
        gate = allocate_lock()
        gate.acquire()
        self._gates[spec.name] = (get_ident(), gate)
        try:
            for watch in watches:
                if watch.before is not None:
                    self._call(spec.name, watch.before, spec)
        finally:
            del self._gates[spec.name]
            gate.release()

    def wait_at_gate(self, fullname: str) -> None:
        """Wait here and not in find_spec, where importlib holds a lock that all imports need."""
        gate = self._gate(fullname)
        if gate is not None and gate.acquire(timeout=GATE_SECONDS):
            gate.release()

    def _gate(self, fullname: str) -> LockType | None:
        owner, gate = self._gates.get(fullname.partition(".")[0], (get_ident(), None))
        return None if owner == get_ident() else gate

    def run_after(self, module: ModuleType) -> None:
        spec = values(module).get("__spec__")
        name = spec.name if spec is not None else module.__name__
        # A module may have put another object in its own place.
        module = sys.modules.get(name, module)
        for watch in tuple(self._watches.get(name, ())):
            # One that was added by a callback, or at the same moment, may have been told.
            if watch.told.get(name) is not execution(module):
                self._tell(name, watch, module)

    def _tell(self, name: str, watch: Watch, module: ModuleType) -> None:
        watch.told[name] = execution(module)
        if watch.after is not None:
            self._call(name, watch.after, module)

    def _call(self, name: str, callback: Callable[[Any], None], argument: Any) -> None:
        try:
            callback(argument)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or getattr(error, "ascend_patch_fatal", False):
                raise
            self._on_error(name, error)

"""Keeps other threads from importing a submodule before its package's callbacks have returned.

Importing a submodule does not wait for a package that another thread is importing, and what the
callbacks decide to watch in it must not slip by. A gate is shut when the package's module is
created, before importlib puts it into sys.modules, and opened when the callbacks have returned.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock, get_ident

from ascend_patch._loaders import values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _frozen_importlib import ModuleSpec

# A limit, so that an unforeseen circle of threads that wait for each other ends.
GATE_SECONDS = 60.0


class GateError(RuntimeError):
    """A submodule is imported although its package's callbacks have not returned."""


class Gate:
    """One package's: a lock that the thread holds which imports it."""

    __slots__ = ("failed", "lock", "owner", "spec")

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec
        self.owner = get_ident()
        self.failed = False
        self.lock = allocate_lock()
        self.lock.acquire()


class Gates:
    """Every gate that is shut, by the name of its package."""

    def __init__(self) -> None:
        self.shut_by_package: dict[str, Gate] = {}

    def shut(self, package: str, spec: ModuleSpec) -> Gate:
        """Shut a package's gate; this thread alone passes."""
        before = self.shut_by_package.get(package)
        gate = self.shut_by_package[package] = Gate(spec)
        if before is not None:
            before.lock.release()  # who waits there looks again
        return gate

    def open(self, package: str, failed: bool = False) -> None:
        """Open a package's gate.

        Args:
            failed: Whether the import of the package is given up: who has waited is told.
        """
        gate = self.shut_by_package.pop(package, None)
        if gate is not None:
            gate.failed = failed
            gate.lock.release()

    def find(self, module: str) -> Gate | None:
        """The gate at which this thread has to wait before it runs a module, if there is one."""
        package, dot, _ = module.partition(".")
        gate = self.shut_by_package.get(package)
        if gate is None or not dot or gate.owner == get_ident():
            return None
        # Also shut by a probe that creates a module and never runs it: that one is not imported.
        return gate if values(sys.modules.get(package)).get("__spec__") is gate.spec else None

    def wait(self, module: str) -> None:
        """Wait until this thread may run a module.

        Raises:
            GateError: After GATE_SECONDS, or where the import of its package was given up.
        """
        while (gate := self.find(module)) is not None:
            if not gate.lock.acquire(timeout=GATE_SECONDS):
                raise GateError(
                    f"what is decided before {gate.spec.name} is imported has taken "
                    f"{GATE_SECONDS:.0f} s in another thread; {module} did not wait longer"
                )
            gate.lock.release()
            if gate.failed:
                raise GateError(f"the import of {gate.spec.name} was given up in another thread")

    def after_fork(self) -> None:
        """In a forked child no other thread is left that could open a gate."""
        for package, gate in list(self.shut_by_package.items()):
            if gate.owner != get_ident():
                del self.shut_by_package[package]

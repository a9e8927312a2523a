"""The shim in a process that imports vLLM: decides, arms, and keeps the record.

It begins right before the code of `vllm` (or of `vllm_ascend`) runs for the first time.
"""

from __future__ import annotations

import importlib
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_patch import __version__, _bootstrap
from ascend_patch._finder import Finder
from ascend_patch._state import UNAPPLIED, PatchState, ProcessState

if TYPE_CHECKING:
    from ascend_patch._apply import Applier
    from ascend_patch._plan import Decision
    from ascend_patch._registry import Patch
    from ascend_patch._verify import Verification

STRICT_VARIABLE = "ASCEND_PATCHES_STRICT"
DEPENDENCIES = ("wrapt", "packaging")


class Refusal(SystemExit):
    """vLLM must not start: the user asked for something that cannot be had, and to be told.

    A SystemExit, so that one sentence is printed and the process ends with status 1.
    """

    ascend_patch_fatal = True

    def __init__(self, sentence: str) -> None:
        super().__init__(f"ascend-patch: {sentence}")


class Runtime:
    """One per process; see `current`."""

    def __init__(self) -> None:
        self.state = ProcessState()
        self.decisions: Mapping[str, Decision] = {}
        self.digest = ""
        self.verification: Verification | None = None
        self.tests_at_load = False
        self._lock = threading.RLock()
        self._begun = False
        self._refusal: Refusal | None = None
        self._finder: Finder | None = None
        self._applier: Applier | None = None

    def begin(self, finder: Finder) -> None:
        """Decide and arm; only the first call of a process does anything.

        Raises:
            Refusal: ASCEND_PATCHES cannot be understood, or ASCEND_PATCHES_STRICT=1 and a
                selected patch cannot be applied.
        """
        with self._lock:
            if self._refusal is not None:
                # Whoever swallowed it, a thread for example, does not get vLLM unpatched either.
                raise self._refusal
            if self._begun:
                return
            self._begun = True
            self._finder = finder
            self.state.open_files()
            os.register_at_fork(after_in_child=self._after_fork)
            multiprocessing.util.register_after_fork(self.state, ProcessState.write)
            try:
                self._decide_or_fail(finder)
            except Refusal as refusal:
                self._refusal = refusal
                self.state.problems.append(str(refusal))
                raise
            finally:
                self.state.write()
            self.state.announce()

    def _decide_or_fail(self, finder: Finder) -> None:
        try:
            self._decide_and_arm(finder)
        except (Refusal, KeyboardInterrupt):
            raise
        except BaseException as error:
            # A fault of the shim itself: nothing is armed, and no state may claim otherwise.
            reason = f"{type(error).__name__}: {error}; vLLM runs as it was"
            for patch in self.state.patches.values():
                if patch.state == "armed":
                    patch.state, patch.reason = "failed", reason
            self.state.patches.setdefault("all", PatchState("all", __version__, "failed", reason))
            record_internal_error("vllm was imported", error)
            _bootstrap.complain(f"failed: {reason}")
            self._refuse_if_strict()

    def _decide_and_arm(self, finder: Finder) -> None:
        missing = [name for name in DEPENDENCIES if not _importable(name)]
        if missing:
            self._without_dependencies(" and ".join(missing))
            return
        from ascend_patch import _hooks, _plan, _registry, _selection, _selftest, _verify, _versions
        from ascend_patch._apply import Applier

        registry = _registry.load()
        # Not os.environ: a neighbour's sitecustomize may have emptied it since the door opened.
        wanted = _bootstrap.value()
        try:
            selection = _selection.parse(
                wanted,
                tuple(registry),
                tuple(name for name, patch in registry.items() if patch.available),
            )
            installed = _versions.find()
            self.tests_at_load = _selftest.wanted(installed.device)
            self.verification = _verify.begin(
                self.state, tuple(registry), selection.ids, self.found_wrong, self._give_back
            )
        except (
            _selection.SelectionError,
            _selftest.SelfTestError,
            _verify.VerifyError,
            _versions.DeviceError,
        ) as error:
            raise Refusal(str(error)) from None
        self.state.facts.update(
            selection=wanted,
            host=installed.host,
            host_reason=installed.host_reason,
            versions=dict(installed.versions),
            device=installed.device,
            device_reason=installed.device_reason,
        )
        self.decisions = _plan.plan(selection, registry, installed)
        self.digest = _plan.digest(self.decisions, installed.device)
        for name, decision in self.decisions.items():
            self.state.patches[name] = PatchState(
                name,
                decision.patch.version,
                decision.state,
                decision.reason,
                by_name=name in selection.by_name,
            )
        self._refuse_if_strict()
        self._applier = Applier(self.state, finder, self.verification)
        _hooks.install(finder, self)
        self._applier.arm(self.decisions)

    def found_wrong(self, patch_id: str, reason: str) -> None:
        """A patch that is applied computes something else than it must: the host's own code runs.

        Raises:
            Refusal: ASCEND_PATCHES_STRICT=1.
        """
        if self._applier is not None:
            self._applier.condemn(patch_id, reason)
        self.state.write()
        self._refuse_if_strict()

    def _give_back(self) -> None:
        if self._applier is not None:
            self._applier.give_back()

    def _without_dependencies(self, names: str) -> None:
        reason = (
            f"{names} is missing; `pip install {names.replace(' and ', ' ')}`; vLLM runs as it was"
        )
        self.state.patches["all"] = PatchState("all", __version__, "failed", reason)
        _bootstrap.complain(reason)
        self._refuse_if_strict()

    def _refuse_if_strict(self) -> None:
        if os.environ.get(STRICT_VARIABLE, "").strip() not in ("1", "true", "yes", "on"):
            return
        patches = self.state.patches.values()
        wrong = [f"patch {p.id} is {p.state}: {p.reason}" for p in patches if p.state in UNAPPLIED]
        wrong += [
            f"patch {patch.id} is hidden: {target.id} is {target.reason}"
            for patch in patches
            for target in patch.targets
            if target.state == "hidden"
        ]
        if wrong:
            raise Refusal(f"{STRICT_VARIABLE}=1 and {'; '.join(wrong)}")

    def model_is_loaded(self, model: Any = None) -> None:
        """Look again at what was installed, and test it; with STRICT, refuse what failed since.

        Raises:
            Refusal: ASCEND_PATCHES_STRICT=1 and a patch failed while its modules were imported, or
                gives wrong results for this model.
        """
        with self._lock:
            self.state.facts["model_loaded"] = True
            if self.verification is not None:
                self.verification.model_is_loaded()
            self.look_again()
            self._refuse_if_strict()
        # Without the lock: it imports kernels, and another thread may import the host meanwhile.
        if self.tests_at_load and self._applier is not None:
            from ascend_patch import _selftest

            _selftest.run_all(self, self._applier, model)

    def look_again(self) -> None:
        """Attach what came in past the finder, and see whether what was installed is still there.

        A fault here is recorded and not raised: it is called from the host's own code.
        """
        with self._lock:
            try:
                self._look_again()
            except Exception as error:
                record_internal_error("targets were looked at again", error)
            self.state.write()

    def _look_again(self) -> None:
        if self._applier is None or self._finder is None:
            return
        for module in self._finder.sweep():
            self._applier.module_was_missed(module)
        for change in self._applier.check():
            _bootstrap.complain(change)

    def revert(self, patch_id: str) -> None:
        """Take a patch back in this process."""
        with self._lock:
            name = self._known(patch_id)
            if self._applier is not None and name in self.state.patches:
                self._applier.revert(name)

    def apply(self, patch_id: str) -> None:
        """Apply a reverted patch again."""
        with self._lock:
            name = self._known(patch_id)
            if self._applier is not None and name in self.state.patches:
                self._applier.apply_again(name, sys.modules)

    def status(self) -> dict[str, Any]:
        """The record of this process as plain data."""
        with self._lock:
            if self._applier is not None:
                from ascend_patch import _hooks

                self._applier.check()
                problems = self.state.problems
                problems += [lost for lost in _hooks.lost() if lost not in problems]
            return self.state.snapshot()

    def _known(self, patch_id: str) -> str:
        from ascend_patch import _registry, _selection

        name = _selection.canonical_id(patch_id)
        registry: Mapping[str, Patch] = _registry.load()
        if name not in registry:
            raise KeyError(f"there is no patch {patch_id!r}; there are {', '.join(registry)}")
        return name

    def _after_fork(self) -> None:
        # Another thread may have held the lock when the process forked.
        self._lock = threading.RLock()
        if self._applier is not None:
            self._applier.after_fork()
        if self.verification is not None:
            self.verification.after_fork()
        self.state.after_fork()


_current = Runtime()


def current() -> Runtime:
    """The runtime of this process."""
    return _current


def begin(_spec: object) -> None:
    """Called by the finder when a host is about to be imported, or was found imported."""
    finder = _bootstrap.finder()
    if finder is not None:
        _current.begin(finder)


def record_internal_error(during: str, error: BaseException) -> None:
    """Keep what a finder callback swallowed, so that `status` shows it."""
    _current.state.problems.append(f"while {during}: {type(error).__name__}: {error}")
    _current.state.write()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True

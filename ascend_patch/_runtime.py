"""The shim in a process that imports vLLM: decides, arms, and keeps the record.

It begins right before the code of `vllm` (or of `vllm_ascend`) runs for the first time.
"""

from __future__ import annotations

import multiprocessing.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ascend_patch import __version__, _bootstrap, _dependencies, _env, _guard
from ascend_patch._finder import Finder
from ascend_patch._guard import Refusal, contain
from ascend_patch._once import Once, refuse_if_strict
from ascend_patch._state import PatchState, ProcessState
from ascend_patch._unattached import fail_unattached

if TYPE_CHECKING:
    from ascend_patch._apply import Applier
    from ascend_patch._plan import Decision
    from ascend_patch._verify import Verification

MOST_PROBLEMS = 100


class Runtime:
    """One per process; see `current`."""

    def __init__(self) -> None:
        self.state = ProcessState()
        self.decisions: Mapping[str, Decision] = {}
        self.digest = ""
        self.verification: Verification | None = None
        self.tests_at_load = False
        self._finder: Finder | None = None
        self._applier: Applier | None = None
        # Its lock is held by the thread that decides, which imports no host meanwhile.
        self._decision = Once()
        self._recorded = False
        # The finder's watches from before the first attempt; None until then.
        self._watches_before: set[int] | None = None

    def begin(self, finder: Finder) -> None:
        """Decide and arm; only the first call of a process does anything.

        Raises:
            Refusal: A variable cannot be understood, or ASCEND_PATCHES_STRICT is on and a
                selected patch cannot be applied.
        """
        if self._decision.run(lambda: self._decide(finder)):
            contain("vllm was imported", self._catch_up, finder)

    def is_decided(self) -> bool:
        """Whether it is known what is patched in this process.

        Raises:
            Refusal: It was refused.
        """
        return self._decision.is_done()

    def _decide(self, finder: Finder) -> None:
        contain("an interrupted decision was taken back", self._start_again, finder)
        contain("the record was begun", self._begin_record, finder)
        # Attaching imports replacements, and those import the host: not under this lock.
        finder.postpone()
        try:
            self._decide_or_fail(finder)
        except Refusal as refusal:
            self.state.problems.append(str(refusal))
            self.state.write()
            raise

    def _start_again(self, finder: Finder) -> None:
        """Drop what an attempt has left that failed, or that Ctrl-C ended."""
        if self._watches_before is None:
            self._watches_before = set(map(id, finder.watches()))
        before = self._watches_before
        finder.unwatch([watch for watch in finder.watches() if id(watch) not in before])
        finder.postpone()
        self._applier, self.decisions, self.digest = None, {}, ""
        self.state.patches.clear()

    def _begin_record(self, finder: Finder) -> None:
        self._finder = finder
        if self._recorded:
            return
        self._recorded = True
        self.state.problems += _guard.unrecorded
        os.register_at_fork(after_in_child=lambda: contain("the process forked", self._after_fork))
        multiprocessing.util.register_after_fork(self.state, ProcessState.write)
        self.state.open_files()

    def _catch_up(self, finder: Finder) -> None:
        """Attach what had been imported before, with no lock held: that imports replacements."""
        finder.catch_up()
        self.state.write()
        self.state.announce()

    def _decide_or_fail(self, finder: Finder) -> None:
        try:
            self._decide_and_arm(finder)
        except (Refusal, KeyboardInterrupt):
            raise
        except BaseException as error:
            # A fault of the shim itself: nothing is armed, and no state may claim otherwise.
            _guard.report("vllm was imported", error)
            reason = f"{_guard.describe(error)}; vLLM runs as it was"
            patches = [
                PatchState(p.id, p.version, "failed", reason) if p.state == "armed" else p
                for p in self.state.patches.values()
            ]
            self._start_again(finder)
            self.state.patches.update({patch.id: patch for patch in patches})
            self.state.patches["all"] = PatchState("all", __version__, "failed", reason)
            self._refuse_if_strict()

    def _decide_and_arm(self, finder: Finder) -> None:
        if reason := _dependencies.missing():
            self.state.patches["all"] = PatchState("all", __version__, "failed", reason)
            _bootstrap.complain(reason)
            self._refuse_if_strict()
            return
        from ascend_patch import _hooks, _plan, _registry, _settings, _verify
        from ascend_patch._apply import Applier

        registry = _registry.load()
        try:
            settings = _settings.read(registry)
            selection, installed = settings.selection, settings.installed
            self.tests_at_load = settings.tests_at_load
            self.verification = _verify.begin(
                self.state, tuple(registry), selection.ids, self.found_wrong, self._give_back
            )
        except _env.SettingError as error:
            raise Refusal(str(error)) from None
        self.state.facts.update(
            selection=_env.get(_env.PATCHES),
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
            contain(f"patch {patch_id} was disabled", self._applier.condemn, patch_id, reason)
        self.state.write()
        self._refuse_if_strict()

    def _give_back(self) -> None:
        if self._applier is not None:
            contain("originals were restored", self._applier.give_back)

    def _refuse_if_strict(self) -> None:
        refuse_if_strict(self.state.patches.values())

    def model_is_loaded(self, model: Any = None) -> None:
        """Look again at what was installed, and test it; with STRICT, refuse what failed since.

        Raises:
            Refusal: ASCEND_PATCHES_STRICT=1 and a patch failed while its modules were imported, or
                gives wrong results for this model.
        """
        contain("a model was loaded", self._note_loaded)
        self.look_again()
        if self._applier is not None:
            contain("built layers were looked at", self._applier.find_kept, model)
        self._refuse_if_strict()
        if self.tests_at_load and self._applier is not None:
            contain("patches were tested", self._test, self._applier, model)

    def _note_loaded(self) -> None:
        self.state.facts["model_loaded"] = True
        if self.verification is not None:
            self.verification.model_is_loaded()

    def _test(self, applier: Applier, model: Any) -> None:
        from ascend_patch import _selftest

        _selftest.run_all(self, applier, model)

    def look_again(self) -> None:
        """Attach what came in past the finder, and see whether what was installed is still there.

        A fault here is recorded and not raised: it is called from the host's own code. No lock is
        held: attaching imports replacements, and those import the host.
        """
        contain("targets were looked at again", self._look_again)
        self.state.write()

    def _look_again(self) -> None:
        if self._applier is None or self._finder is None:
            return
        for module in self._finder.sweep():
            self._applier.module_was_missed(module)
        fail_unattached(self._applier, self.decisions, self.state.patches)
        for change in self._applier.check():
            _bootstrap.complain(change)

    def revert(self, patch_id: str) -> None:
        """Take a patch back in this process."""
        name = _known_id(patch_id)
        if self._applier is not None and name in self.state.patches:
            self._applier.revert(name)

    def apply(self, patch_id: str) -> None:
        """Apply a reverted patch again."""
        name = _known_id(patch_id)
        if self._applier is not None and name in self.state.patches:
            self._applier.apply_again(name, sys.modules)

    def status(self) -> dict[str, Any]:
        """The record of this process as plain data."""
        if self._applier is not None:
            from ascend_patch import _hooks

            self._applier.check()
            problems = self.state.problems
            problems += [lost for lost in _hooks.lost() if lost not in problems]
        return self.state.snapshot()

    def _after_fork(self) -> None:
        self._decision.after_fork()
        if self._finder is not None:
            self._finder.after_fork()
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
    if (finder := _bootstrap.finder()) is None:
        raise RuntimeError("the shim's finder is gone from sys.meta_path; nothing is patched")
    _current.begin(finder)


def record_internal_error(during: str, error: BaseException) -> None:
    """Keep what the guard swallowed, so that `status` shows it."""
    problem = f"while {during}: {_guard.describe(error)}"
    problems = _current.state.problems
    if problem not in problems and len(problems) < MOST_PROBLEMS:
        problems.append(problem)
    _current.state.write()


def _known_id(patch_id: str) -> str:
    from ascend_patch import _registry, _selection

    name, known = _selection.canonical_id(patch_id), _registry.load()
    if name not in known:
        raise KeyError(f"there is no patch {patch_id!r}; there are {', '.join(known)}")
    return name

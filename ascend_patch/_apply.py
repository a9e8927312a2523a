"""Applies decided patches as their modules are imported: all of a patch, or nothing of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ascend_patch import _bootstrap, _devices, _late
from ascend_patch._finder import Finder, Watch
from ascend_patch._guard import describe, ends_import
from ascend_patch._installation import Installation
from ascend_patch._plan import Decision
from ascend_patch._registry import NOTHING, ORIGINAL, REFERENCE, Target
from ascend_patch._replacement import SeamError
from ascend_patch._seams import make
from ascend_patch._state import PatchState, ProcessState, TargetState

if TYPE_CHECKING:
    from ascend_patch._verify import Verification

# The states of a patch whose targets are attached as their modules run.
WANTED = ("armed", "applied")


class Applier:
    """Holds what is installed in this process, per patch and target.

    Args:
        state: Where every step is recorded.
        finder: Tells when a module has run.
        verification: What is compared with the host's own code, if anything is.
    """

    def __init__(
        self, state: ProcessState, finder: Finder, verification: Verification | None = None
    ) -> None:
        self._state = state
        self._finder = finder
        self._verification = verification
        self._decisions: Mapping[str, Decision] = {}
        self._installed: dict[str, dict[str, Installation]] = {}
        self._reverted: dict[str, dict[str, Installation]] = {}
        # What was installed in modules that have been reloaded or imported again since.
        self._outgrown: dict[str, list[Installation]] = {}
        # What was found wrong inside a call of its own, and is taken back after that call.
        self._condemned: dict[str, dict[str, Installation]] = {}
        # Modules that had run before their targets were attached.
        self._late: set[str] = set()
        # Held while targets change, and never while anything is imported: this code runs under
        # the import locks of the modules that it changes.
        self._lock = threading.RLock()

    def arm(self, decisions: Mapping[str, Decision]) -> None:
        """Wait for the modules of every armed decision; those already imported are done at once."""
        self._decisions = decisions
        modules: dict[str, None] = {}
        for name, decision in decisions.items():
            patch = self._state.patches[name]
            if decision.state == "armed" and decision.band is not None:
                patch.targets = [TargetState(t.id, t.seam, "armed") for t in decision.band.targets]
                modules.update((target.module, None) for target in decision.band.targets)
        for module in modules:
            if self._finder.watch(module, Watch(after=self.module_has_run)):
                self._note_late(module)

    def module_has_run(self, module: ModuleType) -> None:
        """Attach every target that waits for this module, patch by patch, in order."""
        for name, decision in self._decisions.items():
            patch = self._state.patches[name]
            if patch.state not in WANTED or decision.band is None:
                continue
            targets = [t for t in decision.band.targets if t.module == module.__name__]
            if targets:
                self._attach(patch, targets)
        self._state.write()

    def revert(self, name: str) -> None:
        """Take a patch back; the state says so, and a reload does not bring it back."""
        patch = self._state.patches[name]
        with self._lock:
            if patch.state not in WANTED:
                return
            self._reverted[name] = self._installed.pop(name, {})
            self._take_back(name, self._reverted[name])
            for target in patch.targets:
                target.state, target.reason = "reverted", ""
            patch.state, patch.reason = "reverted", "taken back on request"
        self._state.write()

    def condemn(self, name: str, reason: str) -> None:
        """Ours was found to be wrong: from here on the host's own code runs, and the state says so.

        The targets are switched off at once and given back by `give_back`: an operator's kernel
        must not be destroyed while it runs.

        Args:
            reason: The whole sentence.
        """
        patch = self._state.patches[name]
        with self._lock:
            if patch.state not in WANTED:
                return
            installed = self._condemned[name] = self._installed.pop(name, {})
            for installation in (*installed.values(), *self._outgrown.get(name, ())):
                installation.switch.on = False
            for target in patch.targets:
                target.state, target.reason = "reverted", ""
            patch.state, patch.reason = "failed", reason
        _bootstrap.complain(f"patch {patch.id} failed: {patch.reason}")
        for other in self._those_that_need(name):
            self.condemn(other.id, f"it needs patch {name}, which failed; the host's own code runs")

    def give_back(self) -> None:
        """Take back what was condemned."""
        if not self._condemned:
            return
        with self._lock:
            while self._condemned:
                name, installed = self._condemned.popitem()
                self._state.patches[name].reason += self._take_back(name, installed)
        self._state.write()

    @contextlib.contextmanager
    def as_expected(self, name: str) -> Iterator[None]:
        """What ours is held to, in its place for a while and in every thread.

        The host's own code, or ours with the references of its kernels where the host is wrong.
        """
        with contextlib.ExitStack() as stack:
            for installation in self._installed.get(name, {}).values():
                if installation.target.oracle in ("", ORIGINAL, NOTHING) and installation.switch.on:
                    installation.switch.on = False
                    stack.callback(setattr, installation.switch, "on", True)
                elif installation.target.oracle == REFERENCE:
                    from ascend_patch.kernels import dispatch

                    stack.enter_context(dispatch.only("reference"))
            yield

    def apply_again(self, name: str, imported: Mapping[str, ModuleType]) -> None:
        """Apply a reverted patch again to the modules that are imported."""
        patch, band = self._state.patches[name], self._decisions[name].band
        if patch.state != "reverted" or band is None:
            return
        patch.state, patch.reason = "armed", self._decisions[name].reason
        for target in patch.targets:
            target.state = "armed"
        self._attach(patch, [t for t in band.targets if t.module in imported])
        self._state.write()

    def module_was_missed(self, module: str) -> None:
        """Note that a module ran before its targets were attached."""
        self._note_late(module)

    def after_fork(self) -> None:
        """Another thread may have held the lock when the process forked."""
        self._lock = threading.RLock()

    def check(self) -> list[str]:
        """Look again at every target: is what was installed still what is there?"""
        changed = []
        with self._lock:
            for name, installations in self._installed.items():
                for installation in installations.values():
                    found = installation.found()
                    target = self._state.patches[name].target(installation.target.id)
                    target.reason = found or installation.kept or installation.note
                    hidden = installation.hidden() or installation.kept
                    target.state = "hidden" if hidden else "applied"
                    if found:
                        changed.append(f"{name}: {installation.target.id} is {found}")
        return changed

    def find_kept(self, model: Any) -> None:
        """Look for layers of a model that were built before a target that came late.

        Nothing is looked at where no target did. The state and the log say what was found.
        """
        found = []
        for name, installations in self._installed.items():
            for installation in installations.values():
                target = installation.target
                if target.module not in self._late:
                    continue
                layers = (_late.keepers(model, original) for original in installation.originals())
                kept = [layer for keepers in layers for layer in keepers]
                if kept:
                    installation.kept = _late.sentence(kept, target.module, self._finder)
                    found.append(f"{name}: {target.id} is {installation.kept}")
        for sentence in found:
            _bootstrap.complain(sentence)
        if found:
            self.check()
            self._state.write()

    def _attach(self, patch: PatchState, targets: list[Target]) -> None:
        """Prepare every target, then change them all under the lock; or change none."""
        target_id = ""
        try:
            planned = []
            for target in targets:
                target_id = target.id
                band = self._decisions[patch.id].band
                wrong = _devices.other_platform(band.devices) if band is not None else ""
                if wrong:
                    raise SeamError(wrong)
                planned.append(self._prepare(patch, target))
            with self._lock:
                # In the meantime another thread may have failed the patch, or taken it back.
                if patch.state in WANTED:
                    for installation in planned:
                        target_id = installation.target.id
                        self._install(patch, installation)
        except BaseException as error:
            self._fail(patch, target_id, error)
            if ends_import(error):
                raise

    def _prepare(self, patch: PatchState, target: Target) -> Installation:
        for known in (self._installed, self._reverted):
            installation = known.get(patch.id, {}).get(target.id)
            if installation is not None and installation.in_place():
                return installation
        count = self._state.counters.counter(f"{patch.id}/{target.id}")
        verifier = self._verification.of(patch.id) if self._verification is not None else None
        installation = make(target, count, verifier)
        installation.prepare()
        return installation

    def _install(self, patch: PatchState, installation: Installation) -> None:
        target = installation.target
        done = self._installed.setdefault(patch.id, {})
        before = done.get(target.id)
        # A foreign wrapper may still hold ours after a revert: it is switched on again.
        kept = self._reverted.get(patch.id, {}).pop(target.id, None)
        if before is not installation and not (kept is installation and kept.resume()):
            if before is not None:
                before.make_way()
                self._outgrown.setdefault(patch.id, []).append(before)
            installation.install()
        done[target.id] = installation
        state = patch.target(target.id)
        state.state, state.reason = "applied", installation.note
        patch.state = "applied"

    def _fail(self, patch: PatchState, target_id: str, error: BaseException) -> None:
        """Roll every target of the patch back, and say why; what requires it goes with it."""
        reason = f"{target_id}: {describe(error)}"
        with self._lock:
            reason += self._take_back(patch.id, self._installed.pop(patch.id, {}))
            for target in patch.targets:
                target.state = "failed" if target.id == target_id else "reverted"
            patch.state, patch.reason = "failed", f"{reason}; rolled back, vLLM runs as it was"
        _bootstrap.complain(f"patch {patch.id} failed: {patch.reason}")
        for other in self._those_that_need(patch.id):
            self._fail(other, "", RuntimeError(f"it needs patch {patch.id}, which failed"))

    def _those_that_need(self, name: str) -> list[PatchState]:
        return [
            self._state.patches[other]
            for other, decision in self._decisions.items()
            if name in decision.patch.requires and self._state.patches[other].state in WANTED
        ]

    def _take_back(self, name: str, installed: Mapping[str, Installation]) -> str:
        """Revert the newest first; what goes wrong is returned, and the rest still reverted."""
        problems = ""
        outgrown = self._outgrown.pop(name, [])
        for installation in (*reversed(list(installed.values())), *reversed(outgrown)):
            try:
                installation.revert()
            except BaseException as error:
                problems += f"; taking {installation.target.id} back failed too: {describe(error)}"
        return problems

    def _note_late(self, module: str) -> None:
        self._late.add(module)
        for name, decision in self._decisions.items():
            band = decision.band if self._state.patches[name].state in WANTED else None
            if band and any(target.module == module for target in band.targets):
                self._state.patches[name].notes.append(
                    f"{module} had been imported before; objects built by then keep the original"
                )

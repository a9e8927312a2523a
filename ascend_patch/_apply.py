"""Applies decided patches as their modules are imported: all of a patch, or nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from ascend_patch import _bootstrap
from ascend_patch._finder import Finder, Watch
from ascend_patch._plan import Decision
from ascend_patch._registry import Target
from ascend_patch._seams import AttributeInstallation, Installation, make
from ascend_patch._state import PatchState, ProcessState, TargetState


class Applier:
    """Holds what is installed in this process, per patch and target.

    Args:
        state: Where every step is recorded.
        finder: Tells when a module has run.
    """

    def __init__(self, state: ProcessState, finder: Finder) -> None:
        self._state = state
        self._finder = finder
        self._decisions: Mapping[str, Decision] = {}
        self._installed: dict[str, dict[str, Installation]] = {}
        self._reverted: dict[str, dict[str, Installation]] = {}

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
            if patch.state not in ("armed", "applied") or decision.band is None:
                continue
            targets = [t for t in decision.band.targets if t.module == module.__name__]
            if targets:
                self._attach(patch, targets)
        self._state.write()

    def revert(self, name: str) -> None:
        """Take a patch back; the state says so, and a reload does not bring it back."""
        patch = self._state.patches[name]
        self._reverted[name] = self._installed.pop(name, {})
        for installation in reversed(self._reverted[name].values()):
            installation.revert()
            patch.target(installation.target.id).state = "reverted"
        patch.state, patch.reason = "reverted", "taken back on request"
        self._state.write()

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

    def check(self) -> list[str]:
        """Look again at every target: is what was installed still what is there?"""
        changed = []
        for name, installations in self._installed.items():
            for installation in installations.values():
                found = installation.found()
                if found:
                    self._state.patches[name].target(installation.target.id).reason = found
                    changed.append(f"{name}: {installation.target.id} is {found}")
        return changed

    def _attach(self, patch: PatchState, targets: list[Target]) -> None:
        done = self._installed.setdefault(patch.id, {})
        target_id = ""
        try:
            for target in targets:
                target_id = target.id
                self._attach_one(patch, target, done)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self._fail(patch, target_id, error)
            return
        if done:
            patch.state = "applied"

    def _attach_one(self, patch: PatchState, target: Target, done: dict[str, Installation]) -> None:
        kept = self._reverted.get(patch.id, {}).pop(target.id, None)
        if isinstance(kept, AttributeInstallation) and kept.resume():
            installation: Installation = kept
        else:
            count = self._state.counters.counter(f"{patch.id}/{target.id}")
            installation = make(target, count)
            installation.install()
        done[target.id] = installation
        state = patch.target(target.id)
        state.state, state.reason = "applied", installation.note

    def _fail(self, patch: PatchState, target_id: str, error: BaseException) -> None:
        """Roll every target of the patch back, and say why."""
        reason = f"{target_id}: {type(error).__name__}: {error}"
        for installation in reversed(self._installed.pop(patch.id, {}).values()):
            try:
                installation.revert()
            except BaseException as second:
                reason += f"; rolling {installation.target.id} back failed too: {second}"
        for target in patch.targets:
            target.state = "failed" if target.id == target_id else "reverted"
        patch.state, patch.reason = "failed", f"{reason}; rolled back, vLLM runs as it was"
        _bootstrap.complain(f"patch {patch.id} failed: {patch.reason}")

    def _note_late(self, module: str) -> None:
        for name, decision in self._decisions.items():
            if decision.band and any(target.module == module for target in decision.band.targets):
                self._state.patches[name].notes.append(
                    f"{module} had been imported before; objects built by then keep the original"
                )

"""ASCEND_PATCHES_VERIFY: the host's own code beside ours, inside the running server.

The grammar of the variable, what has been compared in this process, and what happens where the two
differ. `_compare` holds the comparison itself, `_steps` says when a call is part of a real step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ascend_patch import _bootstrap, _env, _selection
from ascend_patch._state import ProcessState
from ascend_patch._verifier import PatchVerifier

VARIABLE = _env.VERIFY


class VerifyError(_env.SettingError):
    """ASCEND_PATCHES_VERIFY cannot be understood; the message says what to write."""


@dataclass(frozen=True)
class Wanted:
    """What is to be compared.

    Attributes:
        calls: Per selected patch how many calls; None is every call.
        idle: Patches that were named and are not selected, so that nothing of them runs.
    """

    calls: Mapping[str, int | None]
    idle: tuple[str, ...] = ()


def parse(value: str | None, known: Collection[str], selected: Collection[str]) -> Wanted:
    """Read a value of ASCEND_PATCHES_VERIFY.

    Args:
        value: `rotary`, `all`, `rotary:100` (the first 100 calls in each process), several of them
            with commas, or one of the words for off. What names a patch goes before `all`.
        known: Every patch id there is.
        selected: Those that ASCEND_PATCHES selects.

    Raises:
        VerifyError: There is no entry, one is no known patch, or its number of calls is no positive
            number.
    """
    if value is None or _selection.is_off(value):
        return Wanted({})
    everything: dict[str, int | None] = {}
    named: dict[str, int | None] = {}
    entries = [entry for part in value.split(",") if (entry := part.strip())]
    if not entries:
        raise VerifyError(f"{VARIABLE}={_env.shown(value)} names no patch. {_HOW}.")
    for entry in entries:
        text, colon, count = entry.partition(":")
        name = _selection.canonical_id(text)
        if name != "all" and name not in known:
            raise VerifyError(
                f"{VARIABLE}={_env.shown(value)}: there is no such patch: "
                f"{_env.shown(text)}.{_selection.did_you_mean(text, known)} {_HOW}."
            )
        calls = _count(value, entry, count) if colon else None
        if name == "all":
            everything = dict.fromkeys(selected, calls)
        else:
            named[name] = calls
    idle = tuple(name for name in named if name not in selected)
    asked = everything | named
    return Wanted({name: asked[name] for name in selected if name in asked}, idle)


_HOW = "Write `all`, `rotary`, or `rotary:100` for the first 100 calls; `none` is off"


def _count(value: str, entry: str, text: str) -> int:
    digits = text.strip()
    # int() would take "1_000", "+5" and digits of other scripts.
    if not (digits.isascii() and digits.isdigit() and int(digits[:18]) > 0):
        raise VerifyError(
            f"{VARIABLE}={_env.shown(value)}: {_env.shown(entry)} gives "
            f"{_env.shown(text)} as the number of calls, which is a whole number from 1. "
            f"{_HOW}."
        )
    return int(digits[:18])


class Verification:
    """All that is compared in this process.

    Args:
        wanted: Per patch how many calls; see `parse`.
        state: Where it is recorded.
        fail: Called with (patch, reason) where the two differ.
        give_back: Called between two steps: what had failed inside one is taken back there.
    """

    def __init__(
        self,
        wanted: Mapping[str, int | None],
        state: ProcessState,
        fail: Callable[[str, str], None],
        give_back: Callable[[], None],
    ) -> None:
        self.state = state
        self.steps = 0
        self.eager: bool | None = None
        self.hooked = False
        self._fail = fail
        self._give_back = give_back
        self._inside = 0
        self._dummies = 0
        self._changed = False
        self._lock = threading.Lock()
        self.patches = {name: PatchVerifier(name, calls, self) for name, calls in wanted.items()}
        state.verification = self.as_data

    def of(self, patch: str) -> PatchVerifier | None:
        """The verifier of a patch, if it is to be compared."""
        return self.patches.get(patch)

    def in_step(self) -> bool:
        """Whether the host serves a request now: no profiling, no warm-up, no dummy batch.

        For the whole process: the halves of a batch may run in threads of their own.
        """
        return self._inside > 0 and self._dummies == 0

    @contextlib.contextmanager
    def step(self, *, counts: bool = True) -> Iterator[None]:
        """A real step; the outermost one is counted, unless there is nothing to run in it."""
        with self._lock:
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                ended = self._inside == 0 and self._dummies == 0
                self.steps += ended and counts
            if ended:
                self._step_ended(first=counts and self.steps == 1)

    @contextlib.contextmanager
    def dummy(self) -> Iterator[None]:
        """Something that looks like a step and is none."""
        with self._lock:
            self._dummies += 1
        try:
            yield
        finally:
            with self._lock:
                self._dummies -= 1

    def _step_ended(self, first: bool) -> None:
        with self._lock:
            changed, self._changed = self._changed or first, False
        self._give_back()
        if changed:
            self.state.write()

    def changed(self) -> None:
        """The status file is written when this step ends."""
        self._changed = True

    def differs(self, verifier: PatchVerifier, sentence: str) -> None:
        """The two differ: the patch is switched off.

        Raises:
            Refusal: ASCEND_PATCHES_STRICT=1.
        """
        # Without --enforce-eager some graph may hold ours that was loaded and never traced here.
        compiled = verifier.compiled or self.eager is False
        reason = (
            f"restart without it: verification: {sentence}; graphs that were compiled or captured "
            "keep ours, everywhere else the host's own code runs"
            if compiled
            else f"verification: {sentence}; the host's own code runs"
        )
        self._fail(verifier.patch, reason)

    def model_is_loaded(self) -> None:
        """A worker has its runner by now; where none was seen, nothing can be compared."""
        problem = f"{VARIABLE}: this release has no step that we know; nothing will be compared"
        if not self.hooked and problem not in self.state.problems:
            self.state.problems.append(problem)
            _bootstrap.complain(problem)

    def after_fork(self) -> None:
        """Another thread may have held a lock when the process forked."""
        self._lock = threading.Lock()
        for verifier in self.patches.values():
            verifier._lock = threading.Lock()

    def as_data(self) -> dict[str, dict[str, Any]]:
        """Per patch what the status file holds."""
        return {
            name: verifier.as_data(self.steps, self.eager)
            for name, verifier in self.patches.items()
        }


def idle_sentence(name: str) -> str:
    """What to say of a patch that is named here and selected nowhere."""
    return (
        f"{VARIABLE} names {name}, which {_selection.VARIABLE} does not select: nothing of it is "
        "compared; add it there"
    )


def begin(
    state: ProcessState,
    known: Collection[str],
    selected: Collection[str],
    fail: Callable[[str, str], None],
    give_back: Callable[[], None],
) -> Verification | None:
    """What ASCEND_PATCHES_VERIFY asks for, ready; None if that is nothing.

    Raises:
        VerifyError: See `parse`.
    """
    wanted = parse(_env.get(VARIABLE), known, selected)
    for name in wanted.idle:
        problem = idle_sentence(name)
        state.problems.append(problem)
        _bootstrap.complain(f"WARNING: {problem}")
    return Verification(wanted.calls, state, fail, give_back) if wanted.calls else None

"""Decides once in a process: other threads wait, and what is refused is refused again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ascend_patch import _env
from ascend_patch._guard import Refusal
from ascend_patch._state import UNAPPLIED, PatchState


class Once:
    """Something that is done once, completely, or was refused for good.

    Ctrl-C leaves it undone, so that the next call does it again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._runs = False
        self._done = False
        self._refusal = ""

    def is_done(self) -> bool:
        """Whether it has been done.

        Raises:
            Refusal: It was refused. Whoever swallowed that, a thread for example, is refused again.
        """
        if self._refusal:
            raise Refusal(self._refusal)
        return self._done

    def run(self, function: Callable[[], None]) -> bool:
        """Do it, unless it is done or this thread is doing it.

        Returns:
            Whether this call did it. The lock is held for the function alone.

        Raises:
            Refusal: From the function, or because it was refused before.
        """
        # Without the lock: the thread that did it may be importing the host by now.
        if self.is_done():
            return False
        with self._lock:
            if self.is_done() or self._runs:
                return False
            self._runs = True
            try:
                function()
            except Refusal as refusal:
                self._refusal = str(refusal).removeprefix("ascend-patch: ")
                raise
            finally:
                self._runs = False
            self._done = True
            return True

    def after_fork(self) -> None:
        """Another thread may have been doing it when the process forked."""
        self._lock = threading.RLock()
        self._runs = False


def refuse_if_strict(patches: Iterable[PatchState]) -> None:
    """Refuse what is selected and does not run, where the user asked for that.

    Raises:
        Refusal: ASCEND_PATCHES_STRICT is on and something does not run, or it cannot be read.
    """
    try:
        if not _env.switch(_env.STRICT):
            return
    except _env.SettingError as error:
        raise Refusal(str(error)) from None
    patches = tuple(patches)
    wrong = [f"patch {p.id} is {p.state}: {p.reason}" for p in patches if p.state in UNAPPLIED]
    wrong += [
        f"patch {patch.id} is hidden: {target.id} is {target.reason}"
        for patch in patches
        for target in patch.targets
        if target.state == "hidden"
    ]
    if wrong:
        raise Refusal(f"{_env.STRICT}=1 and {'; '.join(wrong)}")

"""One target, changed: what every kind of seam can do with it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ascend_patch._registry import Symbol, Target
from ascend_patch._replacement import SeamError, Switch, guarded, load_replacement, verified

if TYPE_CHECKING:
    from ascend_patch._verifier import PatchVerifier

MISSING = object()
HIDDEN = "; that is in force and ours does not run: leave one of the two out"


class Installation:
    """One target, changed. `revert` gives it back; `found` says what is there now."""

    note = ""
    # What was built before the target was changed, and runs the original; see `_late`.
    kept = ""

    def __init__(
        self, target: Target, count: Callable[[], None], verifier: PatchVerifier | None = None
    ) -> None:
        self.target = target
        self.switch = Switch()
        self._count = count
        self._verifier = verifier

    def prepare(self) -> None:
        """Look at the target and make ours; whatever has to be imported is imported here.

        Raises:
            SeamError: What is there is not what was planned. Nothing was changed.
        """
        raise NotImplementedError

    def install(self) -> None:
        """Put ours in place. It imports nothing, so that a lock may be held meanwhile.

        Raises:
            SeamError: What is there is not what `prepare` saw. Nothing was changed.
        """
        raise NotImplementedError

    def in_place(self) -> bool:
        """Whether ours is still what the target leads to, however wrapped."""
        return False

    def resume(self) -> bool:
        """After a revert: switch ours on again if a foreign wrapper still holds it."""
        return False

    def make_way(self) -> None:
        """The target has been executed again, and a new installation takes this one's place."""

    def revert(self) -> None:
        """Give the target back, also where somebody wrapped ours in the meantime."""
        raise NotImplementedError

    def found(self) -> str:
        """Empty if what was installed is what is there; otherwise what is there, as a sentence."""
        return ""

    def originals(self) -> tuple[Any, ...]:
        """The functions that ours took the place of, as an object may have kept them."""
        return ()

    def hidden(self) -> bool:
        """Whether something else has taken the place of what was installed, and ours does not run.

        What calls ours in a way that cannot be seen passes for something else.
        """
        return False

    def _plain(self, original: FunctionType) -> FunctionType:
        if self._verifier is not None:
            return verified(original, self.target, self.switch, self._count, self._verifier)
        replacement = load_replacement(self.target.replacement)
        return guarded(original, replacement, self.switch, self._count)


def owner_of(symbol: Symbol) -> tuple[Any, str]:
    """The module or class that a symbol is an attribute of, and the attribute.

    Raises:
        SeamError: Its module is not imported, or has no such symbol.
    """
    owner: Any = sys.modules.get(symbol.module)
    if owner is None:
        raise SeamError(f"{symbol.module} is not imported")
    *path, name = symbol.qualname.split(".")
    for part in path:
        owner = inspect.getattr_static(owner, part, MISSING)
        if owner is MISSING:
            raise SeamError(f"{symbol.module} has no {part}, which {symbol.qualname} is part of")
    if inspect.getattr_static(owner, name, MISSING) is MISSING:
        raise SeamError(f"{symbol.module} has no {symbol.qualname}")
    return owner, name

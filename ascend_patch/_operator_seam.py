"""Operator seams: a registered operator gets another kernel under its own name and schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from packaging.version import InvalidVersion, Version

from ascend_patch import _layers, _peers
from ascend_patch._installation import HIDDEN, Installation, owner_of
from ascend_patch._registry import Symbol
from ascend_patch._replacement import SeamError

OVERRIDE = "allow_override"
FIRST_TORCH = "2.7"


class OperatorInstallation(Installation):
    """A registered operator, re-implemented under its own name and schema."""

    _library: Any = None
    _impl: Callable[..., None]
    # Where torch says that ours was registered; empty where torch does not say.
    _place = ""

    def prepare(self) -> None:
        import torch

        namespace, _, name = self.target.operator.partition("::")
        symbol = Symbol.parse(self.target.symbol)
        owner, attribute = owner_of(symbol)
        if not hasattr(getattr(torch.ops, namespace), name):
            raise SeamError(f"the operator {self.target.operator} is not registered")
        self._impl = _impl_that_overrides()
        original = inspect.unwrap(getattr(owner, attribute))
        self._ours = self._plain(original)

    def install(self) -> None:
        import torch

        namespace, _, name = self.target.operator.partition("::")
        # Ours lives as long as this object: destroying the library uncovers the host's kernel.
        self._library = torch.library.Library(namespace, "IMPL")
        try:
            # Its default differs between torch releases, so it is always given.
            self._impl(
                self._library, name, self._ours, self.target.dispatch_key, allow_override=True
            )
        except BaseException:
            self.revert()
            raise
        self._place = self._active()

    def found(self) -> str:
        return self._hidden_by() if self.hidden() else ""

    def hidden(self) -> bool:
        return bool(self._place) and self._active() != self._place

    def _hidden_by(self) -> str:
        place = self._active()
        file = place.rpartition(":")[0]
        return (
            f"replaced by a kernel of {place or 'nobody'}{_peers.distribution_of_file(file)} after "
            f"we had applied{HIDDEN}"
        )

    def _active(self) -> str:
        """The file and line that registered the kernel in force for our key."""
        import torch

        dump = getattr(torch._C, "_dispatch_dump", None)
        lines = dump(self.target.operator).splitlines() if dump is not None else []
        head = re.compile(rf"{self.target.dispatch_key}(\[alias\])?: registered at (.+?) ::")
        found = next((match for line in lines if (match := head.match(line))), None)
        return found.group(2) if found else ""

    def make_way(self) -> None:
        # Two kernels of ours must not lie on each other: theirs is destroyed in any order.
        self.revert()

    def revert(self) -> None:
        self.switch.on = False
        library, self._library = self._library, None
        if library is not None:
            library._destroy()


def _impl_that_overrides() -> Callable[..., None]:
    """What registers a kernel in the place of another one: `torch.library.Library.impl`.

    Something else may have wrapped it, with functools.wraps or without. A wrapper that passes any
    keyword on is called as it is; behind one that knows its keywords, torch's own is.

    Raises:
        SeamError: This torch has none, or it cannot be reached; the message says which.
    """
    import torch

    found: Callable[..., None] = torch.library.Library.impl
    # Where there is no wrapper this alone decides.
    if _takes_override(found):
        return found
    behind: Callable[..., None] | None = next(
        (f for f in _layers.reachable(found) if _is_of_torch(f) and _takes_override(f)), None
    )
    if behind is not None:
        return behind
    if not _can_override(torch.__version__):
        raise SeamError(
            f"torch {torch.__version__} cannot override an operator; {FIRST_TORCH} or later can"
        )
    code = getattr(found, "__code__", None)
    where = f"{code.co_name} in {code.co_filename}" if code is not None else repr(found)
    raise SeamError(
        f"torch.library.Library.impl is wrapped by {where}, which takes no {OVERRIDE}; let it pass "
        "keywords on, or leave it out"
    )


def _takes_override(function: Any) -> bool:
    try:
        # Not what it wraps: a wrapper takes what it takes, whatever its signature claims.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return False
    by_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if any(p.name == OVERRIDE for p in parameters):
        return True
    # Whether what it calls takes it, the release says.
    import torch

    return by_any_name and _can_override(torch.__version__)


def _is_of_torch(function: Any) -> bool:
    return getattr(function, "__globals__", {}).get("__name__") == "torch.library"


def _can_override(version: str) -> bool:
    """Whether a release of torch can; one whose version says nothing is taken to be a late one."""
    try:
        return Version(version.partition("+")[0]).release >= Version(FIRST_TORCH).release
    except InvalidVersion:
        return True

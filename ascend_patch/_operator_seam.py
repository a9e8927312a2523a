"""Operator seams: a registered operator gets another kernel under its own name and schema."""

from __future__ import annotations

import inspect
import re
from typing import Any

from ascend_patch import _peers
from ascend_patch._installation import HIDDEN, Installation, owner_of
from ascend_patch._registry import Symbol
from ascend_patch._replacement import SeamError


class OperatorInstallation(Installation):
    """A registered operator, re-implemented under its own name and schema."""

    _library: Any = None
    # Where torch says that ours was registered; empty where torch does not say.
    _place = ""

    def prepare(self) -> None:
        import torch

        namespace, _, name = self.target.operator.partition("::")
        symbol = Symbol.parse(self.target.symbol)
        owner, attribute = owner_of(symbol)
        if not hasattr(getattr(torch.ops, namespace), name):
            raise SeamError(f"the operator {self.target.operator} is not registered")
        if "allow_override" not in inspect.signature(torch.library.Library.impl).parameters:
            raise SeamError(
                f"torch {torch.__version__} cannot override an operator; 2.7 or later can"
            )
        original = inspect.unwrap(getattr(owner, attribute))
        self._ours = self._plain(original)

    def install(self) -> None:
        import torch

        namespace, _, name = self.target.operator.partition("::")
        # Ours lives as long as this object: destroying the library uncovers the host's kernel.
        self._library = torch.library.Library(namespace, "IMPL")
        try:
            # Its default differs between torch releases, so it is always given.
            self._library.impl(name, self._ours, self.target.dispatch_key, allow_override=True)
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

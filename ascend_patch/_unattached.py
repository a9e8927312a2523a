"""Fails a patch of which a module has run without the target in it being attached."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ascend_patch._loaders import is_lazy, values

if TYPE_CHECKING:
    from ascend_patch._apply import Applier
    from ascend_patch._plan import Decision
    from ascend_patch._state import PatchState

WAITS = ("armed", "applied")


def fail_unattached(
    applier: Applier, decisions: Mapping[str, Decision], patches: Mapping[str, PatchState]
) -> None:
    """Switch off what is attached in part, after a sweep has tried the rest once more.

    The shim had a fault where it should have attached a target: no patch is half applied.
    """
    for name, decision in decisions.items():
        for target in decision.band.targets if decision.band is not None else ():
            if patches[name].state not in WAITS or not _has_run(target.module):
                continue
            if patches[name].target(target.id).state == "armed":
                applier.condemn(name, f"{target.id} was not attached; the host's own code runs")
                applier.give_back()


def _has_run(name: str) -> bool:
    module = sys.modules.get(name)
    if module is None or is_lazy(module):
        return False
    return not getattr(values(module).get("__spec__"), "_initializing", False)

"""A patch on a module `ap_m` that is compared with its original, and replacements for it."""

from __future__ import annotations

import importlib
import sys
import types

import torch

from ascend_patch import _verify
from ascend_patch._apply import Applier
from ascend_patch._registry import Target
from ascend_patch._runtime import Refusal

SOURCE = """
def scale(x):
    return x * 2

def scale_(x):
    x *= 2

def both(x):
    return scale(x) + scale(x + 1)

class Layer:
    def forward(self, x, key=None):
        x *= 2
        return x, key
"""


class Site:
    """A patch on `ap_m`, compared; `ours` may be changed to be wrong."""

    def __init__(self, bench) -> None:
        self.bench = bench
        self.failed: list[tuple[str, str]] = []
        self.refuses = False

    def arm(self, *targets: Target, calls: int | None = None) -> types.ModuleType:
        bench = self.bench
        self.verification = _verify.Verification(
            {"demo": calls}, bench.state, self._fail, lambda: bench.applier.give_back()
        )
        bench.applier = Applier(bench.state, bench.finder, self.verification)
        bench.arm(*targets)
        return importlib.import_module("ap_m")

    def _fail(self, patch: str, reason: str) -> None:
        self.failed.append((patch, reason))
        self.bench.applier.condemn(patch, reason)
        if self.refuses:
            raise Refusal(reason)

    def step(self):
        return self.verification.step()

    @property
    def patch(self):
        return self.bench.state.patches["demo"]

    @property
    def compared(self) -> int:
        return self.verification.as_data()["demo"]["compared"]

    @property
    def found(self) -> dict:
        return self.verification.as_data()["demo"]


def built(site, bench):
    """For a fixture: `ap_m` and replacements for it, in a process that verifies."""
    site.write("ap_m", SOURCE)
    ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
    # Right, but not bit by bit, and wrong by half.
    ours.right = lambda original: lambda x: x + x * (1 + 2**-23)
    ours.wrong = lambda original: lambda x: x * 3
    ours.not_a_number = lambda original: lambda x: x * float("nan")
    ours.raises = lambda original: lambda x: 1 / 0
    ours.returns_it = lambda original: lambda x: x.mul_(2)

    def layer(original):
        return lambda self, x, key=None: (x * 2, key)

    def wrong_layer(original):
        return lambda self, x, key=None: (x * 3, key)

    def oracle(original):
        return lambda x: x * 3

    ours.layer, ours.wrong_layer, ours.oracle = layer, wrong_layer, oracle
    ours.host = lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs)
    ours.wrong_host = lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs) + 1
    torch._dynamo.reset()
    yield Site(bench)
    torch._dynamo.reset()


def traced(name: str, ours: str, **more) -> Target:
    return Target(f"ap_m:{name}", "traced", f"ap_ours:{ours}", **more)

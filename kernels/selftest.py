"""What every kernel can be asked on the machine that it is to run on: is the result right?

A kernel's own ``selftest`` module offers suites: its cases, an oracle in float64 on the CPU, and
who served. ``ascend-patch verify`` runs them; the self-test at load judges by the same rules.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch

# Where suites are declared: modules with a tuple ``SUITES``.
MODULES = (
    "ascend_patch.kernels.rope.selftest",
    "ascend_patch.kernels.gdn.selftest",
    "ascend_patch.kernels.kv_layout.selftest",
)

FP32_EPSILON = 2.0**-23
# A small tensor is a small sample: a handful of elements says nothing about a share of 0.1 %.
FEW = 4


@dataclass(frozen=True)
class Verdict:
    """How far a result is from what it must be.

    Attributes:
        ulps: Within how many units in the last place of the result's dtype 99.9 % of the elements
            are. Where two products cancel, the rest may be far from a result that is near zero.
        share: The largest error as a share of what is allowed; at most 1 where nothing is wrong.
        wrong: Empty, or what is wrong, as a sentence.
    """

    ulps: float = 0.0
    share: float = 0.0
    wrong: str = ""

    def and_also(self, other: Verdict) -> Verdict:
        """Both, as one: the larger errors, and what was wrong first."""
        return Verdict(
            max(self.ulps, other.ulps), max(self.share, other.share), self.wrong or other.wrong
        )


def fault(sentence: str) -> Verdict:
    """The verdict where there is nothing to measure."""
    return Verdict(math.inf, math.inf, sentence)


@dataclass(frozen=True)
class Expected:
    """What a tensor must hold.

    Attributes:
        value: float64 on the CPU, in the result's shape.
        weight: Non-negative, in the same shape: the magnitude of what was added up for each
            element, of which four float32 epsilons are allowed; 0 where a value is only copied.
    """

    value: Tensor
    weight: Tensor


class Trial(Protocol):
    """One call of an operator, with its inputs."""

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""

    def judged(self) -> Verdict:
        """Run it: how right is the result?"""


@dataclass(frozen=True)
class Suite:
    """The cases of one operator.

    Attributes:
        operator: As ``dispatch`` knows it.
        patch: The patch that it serves.
        cases: All of them, or (False) those for a quick look; each prints as its name.
        trial: (case, seed, device) -> the call, the same for the same seed.
        offer: (device) -> makes implementations available that wait for a self-test.
    """

    operator: str
    patch: str
    cases: Callable[[bool], Sequence[Any]]
    trial: Callable[[Any, int, str], Trial]
    offer: Callable[[str], object]


def suites() -> list[Suite]:
    """Every suite of every kernel."""
    return [suite for name in MODULES for suite in importlib.import_module(name).SUITES]


def judge(
    got: Tensor, expected: Expected, name: str = "result", *, share_within_an_ulp: bool = True
) -> Verdict:
    """Compare a result with what it must be.

    All elements: within 1 ulp of the result's dtype + 4 float32 epsilons of the weight. 99.9 % of
    them: within 1 ulp; a float32 result has no digits to spare over the products that it is the sum
    of, and is held to an ulp at the weight's magnitude there.

    Args:
        share_within_an_ulp: Whether the second rule holds; where a float32 result is rounded many
            times on its way, the first one is all that can be asked.
    """
    if list(got.shape) != list(expected.value.shape):
        return fault(f"{name} is {list(got.shape)} instead of {list(expected.value.shape)}")
    found = got.detach().to("cpu", torch.float64)
    if found.numel() == 0:
        return Verdict()
    if not found.isfinite().all():
        missing = int((~found.isfinite()).sum())
        return fault(f"{name}: {missing} of {found.numel()} elements are no finite number")
    error = (found - expected.value).abs()
    unit = ulp(torch.maximum(found.abs(), expected.value.abs()), got.dtype)
    bound = unit + 4 * FP32_EPSILON * expected.weight
    strict = unit
    if got.dtype == torch.float32:
        strict = torch.maximum(unit, ulp(expected.weight, got.dtype))
    allowed = max(FEW, error.numel() // 1000)
    share, outside = float((error / bound).max()), int((error > strict).sum())
    in_ulps = (error / strict).flatten()
    ulps = float(in_ulps.topk(min(allowed + 1, in_ulps.numel())).values[-1])
    wrong = ""
    if share > 1:
        at = int((error / bound).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
        wrong = (
            f"{name}: {int((error > bound).sum())} of {error.numel()} elements are out of bounds, "
            f"the worst at {where}: {float(found[where])} instead of "
            f"{float(expected.value[where])}"
        )
    elif share_within_an_ulp and outside > allowed:
        wrong = f"{name}: {outside} of {error.numel()} elements are not within one ulp"
        share = math.inf
    return Verdict(ulps, share, wrong)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` at the magnitude of each element, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs())
    lowest = round(math.log2(info.tiny))
    exponent = torch.where(x == 0, lowest, exponent - 1).clamp_min(lowest)
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)

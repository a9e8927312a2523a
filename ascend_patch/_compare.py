"""Compares what ours gives with what the host's own code gives, on copies of the arguments.

Imports torch when it is called, which is where the host runs its model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ascend_patch._copies import Copies, NotComparable, memory, tensors
from ascend_patch._registry import ORIGINAL, Target
from ascend_patch._verifier import Finding, PatchVerifier

if TYPE_CHECKING:
    import torch

ORACLE = "oracle"
OUT_OF_MEMORY = "out of memory"
# Machine epsilons of the result's dtype, at the largest magnitude of the element's row (the last
# dimension). Two roundings of the inputs, one of each product and one of the result are three half
# epsilons; fp32 results also differ by the order of their sums.
LIMITS = {"bfloat16": 4.0, "float16": 4.0, "float32": 16.0, "float64": 16.0}


def compare(
    verifier: PatchVerifier,
    target: Target,
    original: Callable[..., Any],
    oracle: Callable[..., Any],
    ours: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the oracle on copies and ours on the arguments; return what the caller shall have.

    That is ours where the two agree, and what the original gives where they do not.

    Args:
        oracle: The original itself, or what is right where the original is wrong.

    Raises:
        Refusal: They differ and ASCEND_PATCHES_STRICT=1.
    """
    copies = Copies()
    theirs = copies if oracle is original else Copies()
    try:
        their_args, their_kwargs = theirs.of(args), theirs.of(kwargs)
        oracle_args, oracle_kwargs = copies.of(args), copies.of(kwargs)
        with verifier.instead(ORACLE):
            expected = oracle(*oracle_args, **oracle_kwargs)
    except Exception as error:
        verifier.not_compared(f"{target.id} was not compared: {_sentence(error)}")
        return ours(*args, **kwargs)
    try:
        result = ours(*args, **kwargs)
    except Exception as error:
        if OUT_OF_MEMORY in str(error).lower():
            # The copies may be what it lacked; ours is not wrong for that.
            verifier.not_compared(f"{target.id} was not compared: {_sentence(error)}")
            return copies.hand_over(expected)
        finding = _hopeless("no result", f"ours raised {_sentence(error)}")
    else:
        try:
            finding = find(copies, expected, result, target.limit)
        except Exception as error:
            verifier.not_compared(f"{target.id} could not be compared: {_sentence(error)}")
            return result
    # Before the state is told: with STRICT=1 that raises, and no half of ours may stay.
    if finding.wrong and oracle is not original:
        try:
            with verifier.instead(ORIGINAL):
                # The host's own, as from here on, even where that is what ours was made to mend.
                result = theirs.hand_over(original(*their_args, **their_kwargs))
        except Exception:
            result = copies.hand_over(expected)
    elif finding.wrong:
        result = copies.hand_over(expected)
    verifier.compared(target.id, finding)
    return result


def find(copies: Copies, expected: Any, got: Any, limit: float = 0.0) -> Finding:
    """The largest difference between what two calls returned, and did to their arguments.

    Args:
        copies: Of the arguments: the oracle may have written to the copies, ours to the arguments.
        expected, got: What the two returned.
        limit: In place of the dtype's own limit, if not 0.
    """
    findings = list(_differences(expected, got, "result", limit))
    returned = {memory(tensor) for tensor in tensors(expected)}
    for n, (argument, copy) in enumerate(copies.pairs()):
        # An original that works in place and returns its argument says so by what it returns.
        if copy.numel() and memory(copy) not in returned:
            findings.extend(_differences(copy, argument, f"tensor argument {n}", limit))
    best = max(findings, key=lambda finding: finding.share, default=None)
    return best or Finding(0.0, 0.0, 0.0, "", "no tensor result")


def _differences(expected: Any, got: Any, name: str, limit: float) -> Iterator[Finding]:
    import torch

    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        yield of_tensors(expected, got, name, limit)
    elif isinstance(expected, (tuple, list)) and isinstance(got, (tuple, list)):
        if len(expected) != len(got):
            yield _hopeless(name, f"{name} has {len(got)} items instead of {len(expected)}")
            return
        for n, (theirs, ours) in enumerate(zip(expected, got, strict=True)):
            yield from _differences(theirs, ours, f"{name} {n}", limit)
    elif isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            yield _hopeless(name, f"{name} has other keys: {list(got)} instead of {list(expected)}")
            return
        for key, theirs in expected.items():
            yield from _differences(theirs, got[key], f"{name} {key!r}", limit)
    elif isinstance(expected, torch.Tensor) or isinstance(got, torch.Tensor):
        yield _hopeless(name, f"{name} is {_kind(got)} instead of {_kind(expected)}")
    elif isinstance(expected, (bool, int, float, str, type(None))):
        same = type(expected) is type(got) and (expected == got or expected != expected)
        if not same:
            yield _hopeless(name, f"{name} is {got!r} instead of {expected!r}")


def of_tensors(
    expected: torch.Tensor, got: torch.Tensor, name: str = "result", limit: float = 0.0
) -> Finding:
    """The largest difference between two tensors.

    Floating point: in machine epsilons of the dtype, at the largest magnitude of the element's row
    of `expected`. A number that is missing in ours (NaN, or an infinity) is a difference; where
    the expected one is NaN there is nothing to compare. Everything else has to be the same.
    """
    import torch

    where = f"{name} {list(expected.shape)} {_name(expected.dtype)}"
    if got.shape != expected.shape:
        return _hopeless(where, f"{where} is {list(got.shape)}")
    if got.dtype != expected.dtype:
        return _hopeless(where, f"{where} is {_name(got.dtype)}")
    if got.device != expected.device:
        return _hopeless(where, f"{where} is on {got.device} instead of {expected.device}")
    if expected.numel() == 0:
        return Finding(0.0, 0.0, 0.0, "", where)
    if expected.is_complex():
        return of_tensors(torch.view_as_real(expected), torch.view_as_real(got), name, limit)
    if not expected.is_floating_point():
        differ = int((got != expected).sum())
        wrong = f"{where}: {differ} of {expected.numel()} elements differ" if differ else ""
        return Finding(math.inf if differ else 0.0, float(differ), 0.0, "elements", where, wrong)
    error = _epsilons(expected, got)
    allowed = limit or LIMITS.get(_name(expected.dtype), 1.0)
    worst = float(error.max())
    wrong = ""
    if worst > allowed:
        outside, at = int((error > allowed).sum()), int(error.reshape(-1).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape))
        values = (float(x.reshape(-1)[at]) for x in (got, expected))
        wrong = "{}: {} of {} elements are out of bounds, the worst at {}: {} instead of {}".format(
            where, outside, expected.numel(), index, *values
        )
    return Finding(worst / allowed, worst, allowed, "epsilons", where, wrong)


def _epsilons(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    import torch

    info = torch.finfo(expected.dtype)
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    theirs, ours = expected.detach().to(wide), got.detach().to(wide)
    finite = theirs.isfinite()
    magnitude = torch.where(finite, theirs.abs(), torch.zeros_like(theirs))
    row = magnitude.amax(dim=-1, keepdim=True) if magnitude.dim() else magnitude
    # A row of zeros, or of numbers that are hardly there, still has a step to be measured by.
    unit = (row * info.eps).clamp_min(max(info.tiny * info.eps, torch.finfo(wide).tiny))
    error = (ours - theirs).abs() / unit
    # Infinities: equal ones differ by NaN above. Whatever else is no number is out of bounds.
    error = torch.where(theirs == ours, torch.zeros_like(error), error)
    error = torch.where(error.isnan(), torch.full_like(error, math.inf), error)
    return torch.where(theirs.isnan(), torch.zeros_like(error), error)


def _hopeless(where: str, wrong: str) -> Finding:
    return Finding(math.inf, math.inf, 0.0, "", where, wrong)


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, NotComparable) else f"{type(error).__name__}: {error}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_due(verifier: PatchVerifier, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is to be compared: in a real step, and not while a graph is captured."""
    if _capturing(args, kwargs):
        verifier.compiled = True
        return False
    return verifier.due()


def _capturing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a device graph is being captured on the device of the first tensor."""
    import torch

    first = next(tensors((args, kwargs)), None)
    accelerator = getattr(torch, first.device.type, None) if first is not None else None
    asked = getattr(accelerator, "is_current_stream_capturing", None)
    return bool(asked is not None and asked())

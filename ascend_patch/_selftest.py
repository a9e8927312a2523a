"""The self-test at load: each kernel of an applied patch once, at the loaded model's own shapes.

Between the loading of a model and its compilation and capture. What disagrees with the oracle is
not used: first the implementation, and where the last one is wrong, the patch.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ascend_patch import _bootstrap, _env
from ascend_patch._guard import contain, describe, ends_import

if TYPE_CHECKING:
    from ascend_patch._apply import Applier
    from ascend_patch._plan import Decision
    from ascend_patch._runtime import Runtime

VARIABLE = _env.SELFTEST
SelfTestError = _env.SettingError


class Verdict(Protocol):
    """See `ascend_patch.kernels.selftest.Verdict`."""

    @property
    def ulps(self) -> float: ...
    @property
    def share(self) -> float: ...
    @property
    def wrong(self) -> str: ...


@dataclass(frozen=True)
class Case:
    """One test at a loaded model's shapes.

    Attributes:
        name: For messages: what is called, with which shapes.
        judge: Runs ours and says how right it is; None where there is nothing to run any more. It
            may raise, which counts as wrong.
        withdraw: Takes the implementation that served out of use and returns its name; empty
            where it is the last one.
        warm: Compiles what serving will use, once all is well.
    """

    name: str
    judge: Callable[[], Verdict | None]
    withdraw: Callable[[], str] = lambda: ""
    warm: Callable[[], object] = lambda: None


@dataclass
class Result:
    """What one run found; `wrong` is empty where all is well."""

    cases: int = 0
    ulps: float = 0.0
    share: float = 0.0
    seconds: float = 0.0
    wrong: str = ""
    withdrawn: tuple[str, ...] = ()

    def sentence(self) -> str:
        """As the status shows it."""
        text = f"{self.cases} cases"
        if not self.cases:
            text = "the model has nothing that it could be tried on"
        elif not self.wrong:
            text += (
                f", 99.9 % within {self.ulps:.2f} ulp, largest error {self.share:.2f} of its limit"
            )
        text += f", {self.seconds * 1e3:.0f} ms"
        for withdrawn in self.withdrawn:
            text += f"; no longer used: {withdrawn}"
        return f"{text}; {self.wrong}" if self.wrong else text


def wanted(device: str) -> bool:
    """Whether patches are tested when a model is loaded: on an NPU, unless the variable says no.

    Raises:
        SettingError: The variable says neither yes nor no.
    """
    return _env.switch(_env.SELFTEST, default=device == "npu")


def run_all(runtime: Runtime, applier: Applier, model: Any) -> None:
    """Test every applied patch that declares a test.

    Raises:
        Refusal: ASCEND_PATCHES_STRICT=1 and a patch gives wrong results.
    """
    for name, decision in runtime.decisions.items():
        if runtime.state.patches[name].state != "applied" or not decision.patch.self_test:
            continue
        # A fault of the test itself says nothing about the patch.
        result = contain(f"patch {name} was tested", _test, name, decision, applier, model)
        if result is None:
            continue
        runtime.state.self_tests[name] = result.sentence()
        if result.wrong:
            runtime.found_wrong(name, f"self-test: {result.wrong}; the host's own code runs")
            applier.give_back()
        for withdrawn in result.withdrawn:
            _bootstrap.complain(f"patch {name}: self-test: no longer used: {withdrawn}")
        runtime.state.write()


def _test(name: str, decision: Decision, applier: Applier, model: Any) -> Result:
    with _uncounted():
        return run(_cases(decision.patch.self_test, model, applier, name))


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """What the status counts is what the server runs."""
    dispatch = importlib.import_module("ascend_patch.kernels.dispatch")
    observer = dispatch.set_observer(None)
    try:
        yield
    finally:
        dispatch.set_observer(observer)


def _cases(text: str, model: Any, applier: Applier, patch: str) -> list[Case]:
    module, _, function = text.partition(":")
    # The second argument: `with as_expected(): ...` runs what ours is held to.
    made: list[Case] = getattr(importlib.import_module(module), function)(
        model, lambda: applier.as_expected(patch)
    )
    return made


def run(cases: Sequence[Case]) -> Result:
    """Run cases until all are right, or one is wrong whose implementation is the last one.

    What was right before an implementation was withdrawn is tried again with the next one.
    """
    result, begun = Result(), time.perf_counter()
    _synchronize()
    try:
        while (failed := _first_wrong(cases, result) or _first_cold(cases)) is not None:
            case, sentence = failed
            name = case.withdraw()
            if not name or any(text.startswith(f"{name} (") for text in result.withdrawn):
                result.wrong = sentence
                return result
            result.withdrawn += (f"{name} ({sentence})",)
    finally:
        _synchronize()
        result.seconds = time.perf_counter() - begun
    return result


def _first_wrong(cases: Sequence[Case], result: Result) -> tuple[Case, str] | None:
    result.cases, result.ulps, result.share = 0, 0.0, 0.0
    for case in cases:
        try:
            verdict = case.judge()
        except BaseException as error:
            # A compiler that ends with SystemExit is wrong too.
            if ends_import(error):
                raise
            return case, f"{case.name}: {describe(error)}"
        if verdict is None:
            continue
        result.cases += 1
        if verdict.wrong:
            return case, f"{case.name}: {verdict.wrong}"
        result.ulps = max(result.ulps, verdict.ulps)
        result.share = max(result.share, verdict.share)
    return None


def _first_cold(cases: Sequence[Case]) -> tuple[Case, str] | None:
    for case in cases:
        try:
            case.warm()
        except BaseException as error:
            if ends_import(error):
                raise
            return case, f"{case.name}: it could not be warmed: {describe(error)}"
    return None


def _synchronize() -> None:
    """Wait for the device, so that an error is raised where it was made: in ours or in theirs."""
    torch = sys.modules.get("torch")
    for name in ("npu", "cuda"):
        accelerator = getattr(torch, name, None)
        if accelerator is not None and accelerator.is_available():
            accelerator.synchronize()

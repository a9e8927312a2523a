"""The self-test at load: whom it asks, what it withdraws, and what it leaves of a patch."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from ascend_patch import _runtime, _selftest
from ascend_patch._registry import Target
from ascend_patch._selftest import Case
from ascend_patch.kernels import dispatch

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.selftest import Verdict, fault  # noqa: E402

FINE = Verdict(0.5, 0.25)
WORSE = Verdict(0.75, 0.5)


@pytest.mark.parametrize(
    ("value", "device", "on"),
    [
        (None, "npu", True),
        (None, "cpu", False),
        (None, "cuda", False),
        (None, "emulated", False),
        ("", "npu", True),
        ("0", "npu", False),
        (" Off ", "npu", False),
        ("1", "cpu", True),
        ("TRUE", "cuda", True),
    ],
)
def test_it_is_on_where_an_npu_is_unless_told_otherwise(monkeypatch, value, device, on):
    if value is not None:
        monkeypatch.setenv("ASCEND_PATCHES_SELFTEST", value)
    assert _selftest.wanted(device) is on


def test_neither_yes_nor_no_is_one_sentence(monkeypatch):
    monkeypatch.setenv("ASCEND_PATCHES_SELFTEST", "maybe")
    with pytest.raises(_selftest.SelfTestError, match="'maybe' says neither yes nor no; write 1"):
        _selftest.wanted("cpu")


def test_garbage_is_refused_when_vllm_is_imported(host):
    host.patches('patch("demo", target("vllm.ops:f"))')
    found = host.run("import vllm", ASCEND_PATCHES_SELFTEST="perhaps", fails=True)
    assert found.code == 1
    assert "ASCEND_PATCHES_SELFTEST='perhaps'" in found.err


class Kernel:
    """An operator with implementations of which each is right or wrong, and a log."""

    def __init__(self, **right: Verdict | Exception) -> None:
        self.left = dict(right)
        self.ran: list[str] = []
        self.warmed = 0

    def case(self, name: str = "case") -> Case:
        def judge() -> Verdict:
            first = next(iter(self.left))
            self.ran.append(f"{name} by {first}")
            verdict = self.left[first]
            if isinstance(verdict, Exception):
                raise verdict
            return verdict

        def withdraw() -> str:
            if len(self.left) == 1:
                return ""
            first = next(iter(self.left))
            del self.left[first]
            return first

        def warm() -> None:
            self.warmed += 1

        return Case(name, judge, withdraw, warm)


def test_what_is_right_is_said_with_its_largest_error():
    kernel = Kernel(reference=FINE)
    result = _selftest.run([kernel.case(), Kernel(reference=WORSE).case()])
    assert result.sentence().startswith(
        "2 cases, 99.9 % within 0.75 ulp, largest error 0.50 of its limit, "
    )
    assert result.sentence().endswith(" ms")
    assert kernel.warmed == 1


@pytest.mark.parametrize("how", [fault("it is wrong"), RuntimeError("it is wrong")], ids=str)
def test_a_wrong_implementation_is_withdrawn_and_the_next_one_tried_from_the_start(how):
    kernel = Kernel(triton=FINE, reference=FINE)
    first = kernel.case("first")

    def judge_second() -> Verdict:
        kernel.ran.append(f"second by {next(iter(kernel.left))}")
        if "triton" in kernel.left:
            if isinstance(how, Exception):
                raise how
            return how
        return FINE

    second = Case("second", judge_second, first.withdraw, first.warm)
    result = _selftest.run([first, second])
    assert kernel.ran == [
        "first by triton",
        "second by triton",
        "first by reference",
        "second by reference",
    ]
    assert not result.wrong
    assert "no longer used: triton (second: " in result.sentence()
    assert "it is wrong" in result.sentence()
    assert result.cases == 2
    assert kernel.warmed == 2


def test_where_the_last_one_is_wrong_so_is_the_patch():
    kernel = Kernel(triton=fault("a is off"), reference=fault("b is off"))
    result = _selftest.run([kernel.case()])
    assert result.wrong == "case: b is off"
    assert result.withdrawn == ("triton (case: a is off)",)
    assert kernel.warmed == 0


def test_a_kernel_that_cannot_be_warmed_is_withdrawn():
    """It would be compiled while it serves, or while a graph is captured."""
    kernel = Kernel(triton=FINE, reference=FINE)
    case = kernel.case()

    def warm() -> None:
        if "triton" in kernel.left:
            raise RuntimeError("no compiler")

    result = _selftest.run([Case(case.name, case.judge, case.withdraw, warm)])
    assert not result.wrong
    assert result.withdrawn == ("triton (case: it could not be warmed: RuntimeError: no compiler)",)


def test_what_stays_wrong_when_it_was_withdrawn_ends_the_test():
    case = Case("case", lambda: fault("it is off"), lambda: "triton")
    result = _selftest.run([case])
    assert result.wrong == "case: it is off"
    assert result.withdrawn == ("triton (case: it is off)",)


def test_nothing_to_try_is_said():
    assert "nothing that it could be tried on" in _selftest.run([]).sentence()


# On an applied patch


class Loaded:
    """A runtime with one applied patch on `ap_m`, whose self-test is the test's own."""

    def __init__(self, bench, site) -> None:
        site.write("ap_m", "def scale(x):\n    return x * 2\n")
        ours = sys.modules["ap_ours"] = types.ModuleType("ap_ours")
        ours.traced = lambda original: lambda x: x * 3
        ours.cases = lambda model, as_expected: self.cases(model, as_expected)
        self.module = importlib.import_module("ap_m")
        bench.arm(Target("ap_m:scale", "traced", "ap_ours:traced"))
        decision = bench.decisions["demo"]
        object.__setattr__(decision.patch, "self_test", "ap_ours:cases")
        self.runtime = _runtime.Runtime()
        self.runtime.state, self.runtime.decisions = bench.state, bench.decisions
        self.runtime._applier = bench.applier
        self.runtime.tests_at_load = True
        self.cases = lambda model, as_expected: []

    def load(self, *cases: Case) -> None:
        self.cases = lambda model, as_expected: list(cases)
        self.runtime.model_is_loaded("model")

    @property
    def patch(self):
        return self.runtime.state.patches["demo"]

    @property
    def said(self) -> str:
        return self.runtime.state.snapshot()["self_tests"].get("demo", "")


@pytest.fixture
def loaded(bench, site):
    return Loaded(bench, site)


def test_a_patch_that_passes_stays(loaded):
    loaded.load(Kernel(reference=FINE).case())
    assert loaded.patch.state == "applied"
    assert loaded.said.startswith("1 cases, 99.9 % within 0.50 ulp")
    assert loaded.module.scale(1) == 3


def test_a_patch_that_fails_is_taken_back_and_says_so(loaded, capsys):
    loaded.load(Kernel(reference=fault("it is off")).case("T 7"))
    assert loaded.patch.state == "failed"
    assert loaded.patch.reason == "self-test: T 7: it is off; the host's own code runs"
    assert loaded.module.scale(1) == 2
    assert "T 7: it is off" in loaded.said
    assert "patch demo failed: self-test: T 7: it is off" in capsys.readouterr().err


def test_strict_refuses_a_patch_that_fails(loaded, monkeypatch):
    monkeypatch.setenv("ASCEND_PATCHES_STRICT", "1")
    with pytest.raises(SystemExit, match="patch demo is failed: self-test: T 7: it is off"):
        loaded.load(Kernel(reference=fault("it is off")).case("T 7"))
    assert loaded.module.scale(1) == 2


def test_an_implementation_that_is_withdrawn_is_said_and_the_patch_stays(loaded, capsys):
    loaded.load(Kernel(triton=fault("it is off"), reference=FINE).case("T 7"))
    assert loaded.patch.state == "applied"
    assert "no longer used: triton (T 7: it is off)" in loaded.said
    assert "no longer used: triton (T 7: it is off)" in capsys.readouterr().err


@pytest.mark.expects_failure
def test_a_fault_of_the_test_itself_leaves_the_patch_and_the_server(loaded, monkeypatch):
    monkeypatch.setattr(_runtime, "_current", loaded.runtime)
    loaded.cases = lambda model, as_expected: 1 / 0
    loaded.runtime.model_is_loaded("model")
    assert loaded.patch.state == "applied"
    [problem] = loaded.runtime.state.problems
    assert "while patch demo was tested: ZeroDivisionError" in problem


def test_the_test_can_have_the_host_s_own_code_for_a_while(loaded):
    seen = []

    def cases(model, as_expected):
        seen.append(loaded.module.scale(1))
        with as_expected():
            seen.append(loaded.module.scale(1))
        seen.append(loaded.module.scale(1))
        return []

    loaded.cases = cases
    loaded.runtime.model_is_loaded("model")
    assert seen == [3, 2, 3]


def test_where_the_host_is_wrong_ours_is_held_to_its_reference(loaded, bench):
    wrong = dispatch.Implementation("fast", lambda x: x * 4, priority=10)
    dispatch.register("ap_scale", "cpu", dispatch.Implementation("reference", lambda x: x * 3))
    dispatch.register("ap_scale", "cpu", wrong)
    installed = bench.applier._installed["demo"]["ap_m:scale"]
    object.__setattr__(installed.target, "oracle", "reference")

    def scale():
        found = dispatch.select("ap_scale", "cpu", 1).implementation
        return found.run(loaded.module.scale(1))

    try:
        assert scale() == 12
        with bench.applier.as_expected("demo"):
            assert scale() == 9
        assert scale() == 12
    finally:
        for name in ("fast", "reference"):
            dispatch.unregister("ap_scale", "cpu", name)


def test_what_the_test_runs_is_not_counted(loaded):
    counted = []
    before = dispatch.set_observer(counted.append)
    try:

        def judge() -> Verdict:
            dispatch.observe("op")
            return FINE

        loaded.load(Case("case", judge))
        assert counted == []
        dispatch.observe("op")
        assert counted == ["op"]
    finally:
        dispatch.set_observer(before)


@pytest.mark.parametrize("what", ["off", "not applied", "no test"])
def test_nothing_is_tested_where_there_is_nothing_to_test(loaded, what):
    if what == "off":
        loaded.runtime.tests_at_load = False
    elif what == "not applied":
        loaded.runtime._applier.revert("demo")
    else:
        object.__setattr__(loaded.runtime.decisions["demo"].patch, "self_test", "")
    loaded.load(Kernel(reference=fault("it is off")).case())
    assert loaded.said == ""
    assert loaded.patch.state != "failed"

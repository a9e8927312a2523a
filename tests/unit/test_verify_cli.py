"""`ascend-patch verify`: its report, its exit status, and what it says where it cannot run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch import cli  # noqa: E402
from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels import selftest as kernels_selftest  # noqa: E402
from ascend_patch.kernels.rope import selftest  # noqa: E402

FEW = 3
ALL = selftest.SUITES
ROTARY = "rotary_embedding"
MODULES = [importlib.import_module(name) for name in kernels_selftest.MODULES]
OPERATORS = [suite.operator for module in MODULES for suite in module.SUITES]


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch):
    """The real suites, with fewer cases."""
    for module in MODULES:
        few = tuple(
            dataclasses.replace(suite, cases=lambda _, suite=suite: suite.cases(False)[:FEW])
            for suite in module.SUITES
        )
        monkeypatch.setattr(module, "SUITES", few)


@pytest.fixture
def broken():
    """A reference whose first output is off by one in one element."""
    real = next(i for i in dispatch.candidates(ROTARY, "cpu") if i.name == "reference")

    def run(out, *rest):
        real.run(out, *rest)
        if out.numel():
            out[0, 0] += 1

    dispatch.register(ROTARY, dispatch.ANY_DEVICE, dataclasses.replace(real, run=run))
    yield
    dispatch.register(ROTARY, dispatch.ANY_DEVICE, real)


def test_the_report_of_kernels_that_are_right(capsys):
    assert cli.main(["verify", "--seed", "17"]) == 0
    out = capsys.readouterr().out
    assert "device cpu (" in out
    assert f"torch {torch.__version__}" in out
    assert "seed 17" in out
    for operator in OPERATORS:
        [line] = [line for line in out.splitlines() if line.startswith(operator)]
        # The implementation, its cases, those where it is the first choice, and those it failed.
        assert line.split()[1:5] == ["reference", str(FEW), str(FEW), "0"]
        assert " ulp " in line
    assert out.rstrip().endswith("nothing is wrong")


def test_a_kernel_that_is_wrong_is_named_with_how_to_see_it_again(broken, capsys):
    assert cli.main(["verify", "--seed", "17"]) == 1
    out = capsys.readouterr().out
    assert "  query: 1 of " in out
    assert "elements are out of bounds, the worst at (0, 0)" in out
    again = next(line for line in out.splitlines() if "again: " in line)
    assert "ascend-patch verify --device cpu --seed 17 --case '" in again
    assert out.rstrip().endswith("something is wrong: see above")
    # What it says does repeat it.
    name = again.partition("--case '")[2].rstrip("'")
    assert cli.main(["verify", "--seed", "17", "--case", name]) == 1
    assert f"{name}\n  query: 1 of " in capsys.readouterr().out


def test_a_kernel_that_raises_is_a_failed_case(capsys):
    def run(*call):
        raise RuntimeError("no such core")

    dispatch.register(ROTARY, "cpu", dispatch.Implementation("fast", run, priority=10))
    try:
        assert cli.main(["verify"]) == 1
    finally:
        dispatch.unregister(ROTARY, "cpu", "fast")
    out = capsys.readouterr().out
    assert "RuntimeError: no such core" in out
    [fast, reference] = [line.split() for line in out.splitlines() if line.startswith(ROTARY)]
    assert fast[1:5] == ["fast", str(FEW), str(FEW), str(FEW)]
    # What would serve if that one were gone is tried too.
    assert reference[1:5] == ["reference", str(FEW), "0", "0"]


def test_json_on_standard_output_and_in_a_file(capsys, tmp_path):
    assert cli.main(["verify", "--json"]) == 0
    on_stdout = json.loads(capsys.readouterr().out)
    file = tmp_path / "report.json"
    assert cli.main(["verify", "--json", str(file), "--seed", "3"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    written = json.loads(file.read_text())
    for found in (on_stdout, written):
        assert found["ok"] is True
        assert found["device"] == "cpu"
        assert [kernel["operator"] for kernel in found["kernels"]] == OPERATORS
        assert {kernel["cases"] for kernel in found["kernels"]} == {FEW}
        assert all(0 <= kernel["share"] <= 1 for kernel in found["kernels"])
    assert written["seed"] == 3


def test_a_file_that_cannot_be_written_is_said(capsys, tmp_path):
    assert cli.main(["verify", "--json", str(tmp_path / "no" / "such" / "folder")]) == 1
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--patch", "rotery"], "there are kernels for gdn_attn, kv_connector, rotary"),
        (["--case", "nope"], "there is no case 'nope'"),
        (["--device", "npu"], "sees no npu device here; leave --device out, or use"),
    ],
)
def test_what_cannot_be_done_here_is_one_sentence_and_2(arguments, part, capsys):
    if arguments[-1] == "npu" and hasattr(torch, "npu"):
        pytest.skip("there is an NPU here, or torch_npu")
    assert cli.main(["verify", *arguments]) == 2
    assert part in capsys.readouterr().err
    assert cli.main(["verify", *arguments, "--json"]) == 2
    assert part in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--seed", "x"], ["--quick", "--all"]])
def test_a_wrong_command_line_is_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", *arguments])
    assert caught.value.code == 2


def test_without_torch_it_says_where_to_run_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["verify"]) == 1
    assert "torch is not installed for this interpreter" in capsys.readouterr().err


def test_every_suite_says_what_it_is_for():
    for suite in ALL:
        case = suite.cases(False)[0]
        assert str(case)
        assert [i.name for i in suite.trial(case, 1, "cpu").candidates()] == ["reference"]
        names = [str(case) for case in suite.cases(True)]
        assert len(set(names)) == len(names), "a report could not name one of them"

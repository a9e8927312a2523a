"""scripts/upstream_tests: what it calls a difference, and what it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from _upstream_run import Run
from _upstream_table import Found, summary

TEST, OTHER = "tests/a.py::test_one", "tests/b.py::test_two[1]"
APPLIED = {"patches": [{"id": "rotary", "state": "applied", "reason": ""}], "problems": []}


def run(one: str = "passed", why: str = "", calls: int = 0, **changes: Any) -> Run:
    tests = {
        TEST: {"outcome": one, "why": why, "calls": {"rotary/x:f": calls, "verify/rotary": 9}},
        OTHER: {"outcome": "passed", "why": "", "calls": {}},
    }
    fields = {"tests": tests, "uncollected": {}, "status": APPLIED, "ended": True, **changes}
    return Run(**fields)


def found(patched: Run, stock: Run | None = None, explained: dict[str, str] | None = None) -> Found:
    runs = {"stock": stock or run(status={}), "patched": patched}
    return Found("vllm", "0.18.0", "rotary", runs, explained or {})


def test_the_same_is_no_problem_and_calls_are_counted_by_file():
    same = found(run(calls=3))
    assert same.problems() == []
    assert {row.file: (row.reached, row.calls) for row in same.rows()} == {
        "tests/a.py": (1, 3),
        "tests/b.py": (0, 0),
    }
    assert "1 reached our code by 3 calls; 0 end otherwise, 0 problems" in summary([same])


@pytest.mark.parametrize(
    ("patched", "said"),
    [
        (run("failed", "KeyError"), "passed unpatched, failed (KeyError) patched"),
        (run("skipped", "no GPU"), "passed unpatched, skipped (no GPU) patched"),
        (run(tests={OTHER: {"outcome": "passed", "why": ""}}), "not run patched"),
        (run(ended=False), "patched did not end"),
        (run(status={}), "the shim was not armed"),
        (run(uncollected={"tests/c.py": "failed: ImportError"}), "could not be collected patched"),
        (run(status={"patches": [{"id": "rotary", "state": "failed", "reason": "why"}]}), "why"),
        (run(status={**APPLIED, "problems": ["while vllm was imported"]}), "was imported"),
    ],
)
def test_each_difference_is_a_problem(patched, said):
    (problem,) = found(patched).problems()
    assert said in problem


def test_a_test_that_fails_in_another_way_differs():
    assert found(run("failed", "TypeError"), run("failed", "KeyError", status={})).problems()
    assert not found(run("failed", "KeyError"), run("failed", "KeyError", status={})).problems()


def test_what_is_explained_is_no_problem_until_it_ends_alike():
    why = {"test_one": "it asks a mock"}
    assert found(run("failed", "KeyError"), explained=why).problems() == []
    (problem,) = found(run(), explained=why).problems()
    assert "explained no more" in problem

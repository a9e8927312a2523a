"""The book that is kept of what has been compared."""

from __future__ import annotations

import json
import math
import threading

import pytest

from ascend_patch import _status, _verify
from ascend_patch._state import ProcessState
from ascend_patch._verifier import MAX_NOTES, NEEDS_EAGER, Finding

FINE = Finding(0.25, 1.0, 4.0, "epsilons", "result [2] bfloat16")
WORSE = Finding(0.5, 2.0, 4.0, "epsilons", "result [3] bfloat16")
WRONG = Finding(3.0, 12.0, 4.0, "epsilons", "result [3] bfloat16", "result: 2 elements differ")


class Book:
    """A verification whose failures are kept."""

    def __init__(self, calls: int | None = None) -> None:
        self.state = ProcessState()
        self.failed: list[tuple[str, str]] = []
        self.given_back = 0
        self.it = _verify.Verification(
            {"demo": calls}, self.state, lambda *told: self.failed.append(told), self._give_back
        )
        self.patch = self.it.of("demo")

    def _give_back(self) -> None:
        self.given_back += 1

    def step(self, *findings: Finding) -> None:
        with self.it.step():
            for finding in findings:
                assert self.patch.due()
                self.patch.compared("m:f", finding)

    @property
    def data(self) -> dict:
        return self.state.snapshot()["verification"]["demo"]


def test_the_largest_error_is_kept_with_its_place():
    book = Book()
    book.step(FINE, WORSE, FINE)
    assert book.data == {
        "calls": None,
        "compared": 3,
        "error": 2.0,
        "limit": 4.0,
        "unit": "epsilons",
        "where": "m:f, call 2, result [3] bfloat16",
        "notes": [],
    }
    assert not book.failed


def test_only_so_many_calls_are_compared():
    book = Book(calls=2)
    with book.it.step():
        assert [book.patch.due() for _ in range(4)] == [True, True, False, False]


def test_nothing_is_compared_outside_of_steps_and_inside_of_dummies():
    book = Book()
    assert not book.patch.due()
    with book.it.step():
        assert book.patch.due()
        with book.it.dummy():
            assert not book.patch.due()
            with book.it.step():
                assert not book.patch.due()
        assert book.patch.due()
    assert not book.patch.due()
    # The one inside the dummy is no step.
    assert book.it.steps == 1


def test_the_first_difference_switches_off_and_is_the_last():
    book = Book()
    book.step(FINE, WRONG)
    [(patch, reason)] = book.failed
    assert patch == "demo"
    assert reason.startswith("verification: m:f, call 2: result: 2 elements differ")
    assert reason.endswith("the host's own code runs")
    with book.it.step():
        assert not book.patch.due()
    assert book.given_back == 2


@pytest.mark.parametrize("how", ["traced", "no --enforce-eager"])
def test_what_is_in_a_graph_cannot_be_switched_back(how):
    book = Book()
    book.patch.compiled = how == "traced"
    book.it.eager = how == "traced"
    book.step(WRONG)
    [(_, reason)] = book.failed
    assert reason.startswith("restart without it: verification: m:f, call 1")


@pytest.mark.parametrize(
    ("eager", "compiled", "note"),
    [
        (False, False, NEEDS_EAGER),
        (None, True, NEEDS_EAGER),
        (True, True, NEEDS_EAGER),
        (None, False, "no target that can be compared was called in 2 steps"),
        (True, False, "no target that can be compared was called in 2 steps"),
    ],
)
def test_where_nothing_was_compared_the_status_says_what_is_needed(eager, compiled, note):
    book = Book()
    book.it.eager, book.patch.compiled = eager, compiled
    assert book.data["notes"] == []
    book.step()
    book.step()
    assert book.data["notes"] == [note]
    book.step(FINE)
    assert book.data["notes"] == []


def test_a_reason_is_kept_once_and_not_without_end():
    book = Book()
    for n in range(2 * MAX_NOTES):
        book.patch.not_compared(f"reason {n}")
        book.patch.not_compared(f"reason {n}")
    assert book.data["notes"] == [f"reason {n}" for n in range(MAX_NOTES)]


def test_the_file_is_written_when_a_step_has_changed_something(monkeypatch):
    book = Book(calls=4)
    written = []
    monkeypatch.setattr(ProcessState, "write", lambda self: written.append(self.snapshot()))
    book.step()
    assert len(written) == 1  # the first step, so that `needs --enforce-eager` can be read
    book.step()
    assert len(written) == 1
    book.step(FINE)
    book.step(FINE)
    assert len(written) == 2  # the second one was no larger
    book.step(WORSE)
    assert len(written) == 3
    book.step(FINE)
    assert len(written) == 4  # the last of the four
    assert written[-1]["verification"]["demo"]["compared"] == 4


def test_an_error_without_a_number_is_json(monkeypatch):
    book = Book()
    book.step(Finding(math.inf, math.inf, 0.0, "", "result", "it is None"))
    assert book.data["error"] is None


def test_threads_share_the_budget():
    """The halves of a batch may run in threads of their own."""
    book = Book(calls=1000)
    taken = []

    def work() -> None:
        mine = 0
        while book.patch.due():
            mine += 1
            book.patch.compared("m:f", FINE)
        taken.append(mine)

    with book.it.step():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(taken) == 1000
    assert book.data["compared"] == 1000
    assert book.state.counters.value("verify/demo") == 1000


def test_status_shows_what_was_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_PATCHES_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("ASCEND_PATCHES_RUN", "")
    book = Book(calls=100)
    book.state.open_files()
    book.step(FINE, WORSE)
    book.state.self_tests["demo"] = "12 cases, largest error 0.50 ulp"
    book.state.write()
    with book.it.step():
        book.patch.due()
        book.patch.compared("m:f", FINE)  # no larger: the file stays as it is, the counter does not
    [run] = _status.runs()
    text = "\n".join(_status.as_text(run))
    assert "self-test of demo: 12 cases, largest error 0.50 ulp" in text
    assert (
        "verify of demo: 3 of 100 calls compared, largest error 2 epsilons of 4 allowed "
        "(m:f, call 2, result [3] bfloat16)" in text
    )


def test_a_status_file_from_before_is_read(tmp_path):
    state = ProcessState()
    old = state.snapshot() | {"patches": [], "started": 1.0, "pid": 1}
    for name in ("format", "verification", "self_tests", "counting", "ended", "begins_run"):
        del old[name]
    folder = tmp_path / "20260101T000000-1"
    folder.mkdir()
    (folder / "1-1.json").write_text(json.dumps(old))
    [run] = _status.runs(tmp_path)
    assert run["processes"][0]["verification"] == {}
    assert any("front end" in line for line in _status.as_text(run))

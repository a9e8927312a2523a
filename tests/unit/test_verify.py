"""ASCEND_PATCHES_VERIFY: what it asks for, and the book that is kept of it."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_patch import _doctor, _status, _verify
from ascend_patch._state import ProcessState
from ascend_patch._verifier import MAX_NOTES, NEEDS_EAGER, Finding

KNOWN = ("rotary", "gdn_attn", "kv_connector")
FINE = Finding(0.25, 1.0, 4.0, "epsilons", "result [2] bfloat16")
WORSE = Finding(0.5, 2.0, 4.0, "epsilons", "result [3] bfloat16")
WRONG = Finding(3.0, 12.0, 4.0, "epsilons", "result [3] bfloat16", "result: 2 elements differ")


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (None, {}),
        ("", {}),
        ("none", {}),
        ("0", {}),
        (" , ", {}),
        ("rotary", {"rotary": None}),
        (" Patch-Rotary : 7 ", {"rotary": 7}),
        ("all", {"rotary": None, "gdn_attn": None}),
        ("all:100", {"rotary": 100, "gdn_attn": 100}),
        ("rotary:5,all", {"rotary": 5, "gdn_attn": None}),
        ("all:9,gdn-attn", {"rotary": 9, "gdn_attn": None}),
        ("rotary:1,rotary:2", {"rotary": 2}),
    ],
)
def test_what_is_asked_for(value, calls):
    wanted = _verify.parse(value, KNOWN, ("rotary", "gdn_attn"))
    assert dict(wanted.calls) == calls
    assert wanted.idle == ()


def test_a_patch_that_is_not_selected_is_named_and_not_compared():
    wanted = _verify.parse("rotary,kv_connector:3", KNOWN, ("rotary",))
    assert dict(wanted.calls) == {"rotary": None}
    assert wanted.idle == ("kv_connector",)


COUNTS = ["0", "-1", "", " ", "1.5", "ten", "1e3", "+5", "1_000", "٣", "0x10", "5:5"]


@pytest.mark.parametrize("count", COUNTS)
def test_a_number_of_calls_that_is_none_is_one_sentence_with_a_way_out(count):
    with pytest.raises(_verify.VerifyError) as caught:
        _verify.parse(f"rotary:{count}", KNOWN, KNOWN)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in ("ASCEND_PATCHES_VERIFY=", "a whole number from 1", "`rotary:100`"):
        assert part in sentence


@pytest.mark.parametrize(("value", "meant"), [("rotery", "rotary"), ("al:5", "all")])
def test_an_unknown_name_is_an_error_with_the_nearest_one(value, meant):
    with pytest.raises(_verify.VerifyError, match=f"Did you mean `{meant}`"):
        _verify.parse(value, KNOWN, KNOWN)


@given(st.text(max_size=40))
def test_any_text_is_understood_or_refused_with_a_sentence(text):
    sentence = ""
    wanted = _verify.Wanted({})
    try:
        wanted = _verify.parse(text, KNOWN, KNOWN)
    except _verify.VerifyError as error:
        sentence = str(error)
    assert not sentence or "ASCEND_PATCHES_VERIFY=" in sentence
    assert "\n" not in sentence
    assert set(wanted.calls) <= set(KNOWN)
    assert all(calls is None or calls > 0 for calls in wanted.calls.values())


NAMES = st.sampled_from([*KNOWN, "all"])
ENTRIES = st.lists(st.tuples(NAMES, st.none() | st.integers(1, 10**12)), max_size=6)


@given(ENTRIES, st.sets(st.sampled_from(KNOWN)))
def test_entries_mean_what_they_say(entries, selected):
    value = ",".join(name if n is None else f"{name}:{n}" for name, n in entries)
    wanted = _verify.parse(value, KNOWN, tuple(n for n in KNOWN if n in selected))
    last = dict(entries)
    for name in KNOWN:
        asked = name in last or "all" in last
        assert (name in wanted.calls) == (asked and name in selected)
        if name in wanted.calls:
            assert wanted.calls[name] == last.get(name, last.get("all"))
    assert set(wanted.idle) == (set(last) - {"all"}) - selected


@pytest.mark.parametrize(
    ("variables", "level", "part"),
    [
        ({"ASCEND_PATCHES_VERIFY": "rotary:0"}, "wrong", "a whole number from 1"),
        ({"ASCEND_PATCHES_VERIFY": "gdn_attn"}, "wrong", "ASCEND_PATCHES does not select"),
        ({"ASCEND_PATCHES_VERIFY": "rotary"}, "note", "every call costs two"),
        ({"ASCEND_PATCHES_SELFTEST": "perhaps"}, "wrong", "says neither yes nor no"),
    ],
)
def test_doctor_says_what_a_server_would(monkeypatch, variables, level, part):
    monkeypatch.setenv("ASCEND_PATCHES", "rotary")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    [found] = [f for f in _doctor._selected() if f.about in variables]
    assert found.level == level
    assert part in found.text


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
    book = Book(calls=100)
    book.state.open_files()
    book.step(FINE, WORSE)
    book.state.self_tests["demo"] = "12 cases, largest error 0.50 ulp"
    book.state.write()
    with book.it.step():
        book.patch.due()
        book.patch.compared("m:f", FINE)  # no larger: the file stays as it is, the counter does not
    [run] = _status.runs(tmp_path)
    text = "\n".join(_status.as_text(run))
    assert "self-test of demo: 12 cases, largest error 0.50 ulp" in text
    assert (
        "verify of demo: 3 of 100 calls compared, largest error 2 epsilons of 4 allowed "
        "(m:f, call 2, result [3] bfloat16)" in text
    )


def test_a_status_file_from_before_is_read(tmp_path):
    state = ProcessState()
    old = state.snapshot() | {"patches": [], "started": 1.0}
    del old["verification"], old["self_tests"]
    folder = tmp_path / "20260101T000000-1"
    folder.mkdir()
    (folder / "1-1.json").write_text(__import__("json").dumps(old))
    [run] = _status.runs(tmp_path)
    assert run["processes"][0]["verification"] == {}
    assert any("front end" in line for line in _status.as_text(run))

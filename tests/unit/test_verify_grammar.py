"""What ASCEND_PATCHES_VERIFY asks for, and what is said of what it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_patch import _doctor, _verify

KNOWN = ("rotary", "gdn_attn", "kv_connector")


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (None, {}),
        ("", {}),
        ("none", {}),
        ("0", {}),
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


def test_separators_alone_are_an_error():
    with pytest.raises(_verify.VerifyError, match="names no patch"):
        _verify.parse(" , ", KNOWN, KNOWN)


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


@given(ENTRIES.filter(bool), st.sets(st.sampled_from(KNOWN)))
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

"""The grammar of ASCEND_PATCHES."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_patch._selection import Selection, SelectionError, canonical_id, is_off, parse

KNOWN = ("rotary", "gdn_attn", "kv_connector")
IN_ALL = ("rotary", "gdn_attn")


def ids(value: str) -> tuple[str, ...]:
    return parse(value, KNOWN, IN_ALL).ids


@pytest.mark.parametrize("value", ["", " ", "none", "0", "NONE", " off ", "false", "No"])
def test_off_selects_nothing(value):
    assert is_off(value)
    assert parse(value, KNOWN, IN_ALL) == Selection((), frozenset())


def test_an_unset_variable_is_off():
    assert is_off(None)


@pytest.mark.parametrize(
    ("value", "expected", "by_name"),
    [
        ("all", IN_ALL, ()),
        ("rotary,gdn_attn", ("rotary", "gdn_attn"), ("rotary", "gdn_attn")),
        ("gdn_attn,rotary", ("rotary", "gdn_attn"), ("rotary", "gdn_attn")),
        ("all,-rotary", ("gdn_attn",), ()),
        ("-rotary,all", ("gdn_attn",), ()),
        ("all,kv_connector", KNOWN, ("kv_connector",)),
        ("rotary,-rotary", (), ()),
        ("-rotary", ("gdn_attn",), ()),
        ("-rotary,-gdn_attn", (), ()),
        ("-kv_connector", IN_ALL, ()),
        ("patch_rotary", ("rotary",), ("rotary",)),
        ("Patch-Rotary", ("rotary",), ("rotary",)),
        (" ALL , - KV_connector ", IN_ALL, ()),
        ("rotary,,", ("rotary",), ("rotary",)),
        ("all,rotary", IN_ALL, ("rotary",)),
    ],
)
def test_a_value_selects(value, expected, by_name):
    assert parse(value, KNOWN, IN_ALL) == Selection(expected, frozenset(by_name))


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("rotery", ["ASCEND_PATCHES='rotery'", "no such patch", "Did you mean `rotary`?"]),
        ("al", ["Did you mean `all`?"]),
        ("all,-rotery", ["'-rotery'", "Did you mean `rotary`?"]),
        ("-all", ["`-all` has no meaning"]),
        ("all;rotary", ["no such patch"]),
        (" , ,", ["names no patch"]),
        ("zzz", ["names out of: rotary, gdn_attn, kv_connector"]),
    ],
)
def test_what_cannot_be_understood_is_one_sentence_with_a_way_out(value, parts):
    with pytest.raises(SelectionError) as caught:
        ids(value)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_far_name_gets_no_hint():
    with pytest.raises(SelectionError) as caught:
        ids("zzz")
    assert "Did you mean" not in str(caught.value)


names = st.lists(st.sampled_from(KNOWN), min_size=1, unique=True)


@st.composite
def spelled(draw, name: str) -> str:
    """One of the many ways to write a name."""
    name = draw(st.sampled_from([name, f"patch_{name}", name.replace("_", "-")]))
    cased = "".join(draw(st.sampled_from([c.lower(), c.upper()])) for c in name)
    blanks = st.text(alphabet=" \t", max_size=2)
    return draw(blanks) + cased + draw(blanks)


@given(wanted=names, data=st.data())
def test_names_survive_spelling_and_order(wanted, data):
    value = ",".join(data.draw(spelled(name)) for name in wanted)
    assert parse(value, KNOWN, IN_ALL) == Selection(
        tuple(name for name in KNOWN if name in wanted), frozenset(wanted)
    )


@given(wanted=names, refused=names, data=st.data())
def test_minus_wins_wherever_it_stands(wanted, refused, data):
    entries = data.draw(st.permutations([*wanted, *(f"-{name}" for name in refused)]))
    left = set(wanted) - set(refused)
    found = parse(",".join(entries), KNOWN, IN_ALL)
    assert (set(found.ids), found.by_name) == (left, left)


@given(wanted=names)
def test_a_selection_can_be_written_and_read_again(wanted):
    first = parse(",".join(wanted), KNOWN, IN_ALL)
    assert parse(",".join(first.ids), KNOWN, IN_ALL) == first


@given(st.text(alphabet=string.printable + "äß€\u2028", max_size=40))
def test_any_text_is_a_selection_or_one_line(value):
    sentence, found = "", ()
    try:
        found = ids(value)
    except SelectionError as error:
        sentence = str(error)
    assert len(sentence.splitlines()) <= 1
    assert set(found) <= set(KNOWN)


@given(st.sampled_from(KNOWN), st.sampled_from(["", "patch_", "PATCH-", " "]))
def test_a_canonical_name_is_its_own(name, prefix):
    assert canonical_id(canonical_id(prefix + name)) == canonical_id(prefix + name) == name

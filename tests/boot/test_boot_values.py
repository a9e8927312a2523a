"""ASCEND_PATCHES may hold anything: a process either works or ends with one clear line."""

from __future__ import annotations

import os
import sys

import pytest
from house import start
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ascend_patch import _selection

KNOWN = ("rotary", "attention_router", "gdn_attn", "kv_connector")
IN_ALL = ("rotary", "gdn_attn")
words = st.sampled_from([*KNOWN, "all", "none", "patch_rotary", "ROTARY", "-rotary", "-all", ""])
# What an environment can hold: no NUL, and bytes that are no UTF-8 arrive as lone surrogates.
anything = st.one_of(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40),
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
)
values = st.one_of(
    anything,
    st.lists(st.one_of(words, anything), max_size=8).map(",".join),
    st.lists(words, max_size=8).map(" , ".join),
)
PARTING = [
    "all",
    "rotary",
    " Patch_Rotary , -rotary ",
    "all,-kv_connector",
    "none",
    "rotory",
    ",,,",
    "-all",
    "-",
    "--",
    "\t\n",
    "all\nrotary",
    "alle Flicken, bitte: ü€🙂",
    "\udcff\udc80",
    "'; import os #",
    "%s %d {} {0}",
    "x" * 100_000,
    "rotary," * 10_000,
    "\x1b[31mred\x07",
    "no_such_patch",
]


@given(values)
@example("\udcff")
@example("-" * 50)
@example("," * 50)
def test_parse_returns_known_patches_or_one_sentence(value):
    found, sentence = parsed(value)
    if found is None:
        assert sentence.startswith("ASCEND_PATCHES=")
        assert sentence.isprintable()
        return
    assert set(found.ids) <= set(KNOWN)
    assert list(found.ids) == [name for name in KNOWN if name in found.ids]
    assert found.by_name <= set(found.ids)


def parsed(value):
    try:
        return _selection.parse(value, KNOWN, IN_ALL), ""
    except _selection.SelectionError as error:
        return None, str(error)


@given(st.sets(st.sampled_from(KNOWN)), st.data())
def test_writing_it_differently_means_the_same(wanted, data):
    order = data.draw(st.permutations(sorted(wanted)))
    dress = st.sampled_from(["{}", " {} ", "patch_{}", "Patch-{}", "{},", ",{}"])
    value = ",".join(data.draw(dress).format(name).replace("_", "-") for name in order)
    found = _selection.parse(value, KNOWN, IN_ALL)
    assert set(found.ids) == wanted


@given(values)
def test_off_is_decided_as_the_door_decides_it(value):
    from ascend_patch import _bootstrap

    assert _selection.is_off(value) == (value.strip().lower() in _bootstrap.OFF)


@pytest.mark.parametrize("value", PARTING, ids=lambda value: ascii(value)[:30])
def test_a_process_without_vllm_never_notices(value, checkout):
    done = start([sys.executable, "-c", "print(1)"], path=(checkout,), ASCEND_PATCHES=value)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("value", PARTING, ids=lambda value: ascii(value)[:30])
def test_a_process_with_vllm_works_or_ends_with_one_line(value, checkout, fake_vllm, tmp_path):
    check_with_vllm(value, checkout, fake_vllm, tmp_path)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=values)
def test_any_process_with_vllm_works_or_ends_with_one_line(value, checkout, fake_vllm, tmp_path):
    check_with_vllm(value, checkout, fake_vllm, tmp_path)


def check_with_vllm(value, checkout, fake_vllm, tmp_path):
    done = start(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"],
        path=(checkout, fake_vllm),
        ASCEND_PATCHES=value,
        ASCEND_PATCHES_DEVICE="cpu",
        ASCEND_PATCHES_STATUS_DIR=str(tmp_path / "status"),
    )
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert done.stdout == "0.18.0\n"
        assert "failed while" not in done.stderr
        return
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ascend-patch: ASCEND_PATCHES=")
    assert done.stderr.count("\n") == 1, "more than one line"
    assert done.stderr[:-1].isprintable()

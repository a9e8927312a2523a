"""MooncakeConnectorV1 of vllm_ascend 0.23.0, which reports what was not loaded itself."""

from __future__ import annotations

import pytest
from ascend_kv_runs import both, check_moves, check_waited

pytestmark = pytest.mark.slow

LOCAL = [1, 3, 5]
each_release = pytest.mark.parametrize("release", ["0.23.0", "releases/v0.23.0"])


def said(found: dict) -> list:
    """(finished, invalid blocks) of each decode rank; the release says it when it knows it."""
    return [(one["done"], one["invalid"] or one["early"]) for one in found["heard"]]


@each_release
def test_what_the_release_moves_is_moved_as_before(release):
    check_moves(release, said)


@each_release
def test_the_release_reports_a_pull_that_fails(release):
    """With the patch or without it, and the next request is another."""
    for found in both(release, "engine fails"):
        assert said(found["one"]) == [(True, LOCAL)] * 2
        assert set(found["one"]["freed"]) == {1}
        assert said(found["next"]) == [(True, [])] * 2
        assert all(found["next"]["right"])


@each_release
@pytest.mark.parametrize("ratio", ["8 -> 3", "6 -> 4"])
def test_heads_that_no_rank_would_get_are_refused(release, ratio):
    stock, ours = both(release, ratio)
    ranks = int(ratio[-1])
    assert said(stock) == [(True, [])] * ranks
    assert said(ours) == [(True, LOCAL)] * ranks
    assert set(ours["freed"]) == {1}
    assert len(ours["lines"]) == ranks
    assert all(f"prefill TP {ratio[0]} -> decode TP {ratio[-1]}" in one for one in ours["lines"])


@each_release
def test_a_prefill_server_with_other_blocks(release):
    stock, ours = both(release, "other blocks")
    assert said(stock) == [(True, [])] * 2
    assert not any(stock["right"])
    assert said(ours) == [(True, LOCAL)] * 2


@each_release
def test_prefill_ranks_that_do_not_answer(release):
    """The release's thread waits for ever for a message that nobody takes."""
    stock, ours = both(release, "silent peers")
    for request in ("one", "two"):
        assert not stock[request]["done"]
        assert ours[request]["done"]
        assert LOCAL in (ours[request]["invalid"], ours[request]["early"])
    assert ours["three"]["done"]
    assert all(ours["right"])


@each_release
def test_a_request_that_waited_until_prefill_gave_its_blocks_away(release):
    stock, ours = both(release, "waited")
    check_waited(stock, ours, LOCAL, said)


@each_release
def test_more_decode_ranks_stay_the_release_s_error(release):
    for starts in both(release, "starts"):
        assert "must be greater than or equal to the decode_tp_size" in starts

"""MooncakeConnectorV1 of vllm_ascend: unpatched it calls a failed pull done; patched it says so."""

from __future__ import annotations

import pytest
from ascend_kv_runs import PATCH, RELEASES, both, results

pytestmark = pytest.mark.slow

LOCAL = [1, 3, 7]
# Their requests name no size of prefill's; from 0.18 on they do.
OLDER = tuple(release for release in RELEASES if "0.13" in release)
each_release = pytest.mark.parametrize("release", RELEASES)


def said(found: dict) -> list:
    """(finished, invalid blocks) of each decode rank; nothing is reported before the end."""
    assert not any(one["early"] for one in found["heard"])
    return [(one["done"], one["invalid"]) for one in found["heard"]]


@each_release
def test_what_the_release_moves_is_moved_as_before(release):
    for patches in ("none", PATCH):
        for ratio, found in results(release, patches)["ratios"].items():
            assert all(found["right"]), (patches, ratio)
            assert set(map(str, said(found))) == {"(True, [])"}, (patches, ratio)
            assert set(found["freed"]) == {1}, (patches, ratio)


@each_release
def test_no_choice_of_the_release_in_powers_of_two_is_refused(release):
    found = results(release, PATCH)["choices"]
    print(found)
    assert found["asked"] > 3000
    assert not found["refused"]


@each_release
def test_a_pull_that_fails_once_is_pulled_again(release):
    stock, ours = both(release, "engine fails once")
    assert said(stock["one"]) == [(True, [])] * 2
    assert not all(stock["one"]["right"])
    assert said(ours["one"]) == [(True, [])] * 2
    assert all(ours["one"]["right"])
    assert set(ours["one"]["freed"]) == {1}


@each_release
def test_a_pull_that_fails_is_reported_with_its_end(release):
    stock, ours = both(release, "engine fails")
    assert said(stock["one"]) == [(True, [])] * 2
    assert not any(stock["one"]["right"])
    assert said(ours["one"]) == [(True, LOCAL)] * 2
    # Prefill need not wait for its time-out, and the next request is another.
    assert set(ours["one"]["freed"]) == {1}
    assert said(ours["next"]) == [(True, [])] * 2
    assert all(ours["next"]["right"])
    assert "TP 2" in ours["one"]["lines"][-1]
    assert "3 blocks are invalid" in ours["one"]["lines"][-1]


@each_release
@pytest.mark.parametrize("ratio", ["8 -> 3", "6 -> 4"])
def test_heads_that_no_rank_would_get_are_refused(release, ratio):
    """Of 8 heads, three decode ranks hold 6; with six prefill ranks the worker itself ends."""
    stock, ours = both(release, ratio)
    ranks = int(ratio[-1])
    if ratio == "8 -> 3":
        assert said(stock) == [(True, [])] * ranks
    else:
        assert stock == {"raised": "IndexError"}
    assert said(ours) == [(True, LOCAL)] * ranks
    assert set(ours["freed"]) == {1}
    assert len(ours["lines"]) == ranks
    for line in ours["lines"]:
        assert f"prefill TP {ratio[0]} -> decode TP {ratio[-1]}: 8 KV heads" in line


@pytest.mark.parametrize("release", OLDER)
def test_a_prefill_server_of_another_size_than_configured(release):
    """The heads of ranks 2 and 3 are never read; what is read is laid out as if it were all."""
    stock, ours = both(release, "prefill is larger")
    assert said(stock) == [(True, [])] * 2
    assert not any(stock["right"])
    assert said(ours) == [(True, LOCAL)] * 2
    assert all("set it to 4" in line for line in ours["lines"])


@each_release
def test_a_prefill_server_with_other_blocks(release):
    stock, ours = both(release, "other blocks")
    assert said(stock) == [(True, [])] * 2
    assert not any(stock["right"])
    assert said(ours) == [(True, LOCAL)] * 2
    assert all("block size: prefill has 4, decode 6" in line for line in ours["lines"])


@each_release
def test_prefill_ranks_that_do_not_answer_stop_nothing(release):
    stock, ours = both(release, "silent peers")
    assert stock["one"] == {"done": True, "invalid": [], "early": []}
    assert not stock["two"]["done"]
    assert not stock["three"]["done"]
    for request in ("one", "two"):
        assert ours[request] == {"done": True, "invalid": LOCAL, "early": []}
    assert ours["three"] == {"done": True, "invalid": [], "early": []}
    assert all(ours["right"])


@each_release
def test_a_request_that_ends_before_it_was_noted_ends(release):
    stock, ours = both(release, "quick")
    assert not any(stock["done"])
    assert all(ours["done"])


@pytest.mark.parametrize("release", OLDER)
def test_the_runner_hands_on_what_was_not_loaded(release):
    stock, ours = both(release, "runner")
    assert stock == {"done": ["one"], "invalid": []}
    assert ours == {"done": ["one"], "invalid": [4, 9]}


@each_release
def test_undo(release):
    found = results(release, PATCH)["reverted"]
    assert said(found) == [(True, [])]
    assert not any(found["right"])

"""MooncakeConnectorV1 of vllm_ascend 0.11.0, whose vLLM has no blocks that were not loaded."""

from __future__ import annotations

import json

import pytest
from ascend_case import BRANCHES, START, Host
from ascend_kv_runs import BUILT, ENDING, PATCH, both, check_moves, once, opening, results, said

pytestmark = pytest.mark.slow

each_release = pytest.mark.parametrize("release", ["0.11.0", "v0.11.0-dev"])


@each_release
def test_what_the_release_moves_is_moved_as_before(release):
    check_moves(release)


@each_release
def test_a_pull_that_fails(release):
    """Once: it is pulled again. For good: the request ends as one that failed."""
    stock, ours = both(release, "engine fails once")
    assert not all(stock["one"]["right"])
    assert said(ours["one"]) == [(True, [])] * 2
    assert all(ours["one"]["right"])
    stock, ours = both(release, "engine fails")
    assert said(stock["one"]) == [(True, [])] * 2
    assert not any(stock["one"]["right"])
    assert said(ours["one"]) == [(True, ["one"])] * 2
    assert set(ours["one"]["freed"]) == {1}
    assert said(ours["next"]) == [(True, [])] * 2
    assert all(ours["next"]["right"])


@each_release
@pytest.mark.parametrize("ratio", ["8 -> 3", "6 -> 4"])
def test_heads_that_no_rank_would_get_are_refused(release, ratio):
    stock, ours = both(release, ratio)
    ranks = int(ratio[-1])
    assert stock == {"raised": "IndexError"} or said(stock) == [(True, [])] * ranks
    assert said(ours) == [(True, ["one"])] * ranks
    assert set(ours["freed"]) == {1}
    assert len(ours["lines"]) == ranks


@each_release
def test_prefill_ranks_that_do_not_answer(release):
    """The release raises while it tells prefill of the end, and does not note it: it waits."""
    stock, ours = both(release, "silent peers")
    for request in ("one", "two"):
        assert not stock[request]["done"]
        assert ours[request] == {"done": True, "invalid": [request], "early": []}
    assert ours["three"] == {"done": True, "invalid": [], "early": []}
    assert all(ours["right"])


@each_release
def test_a_request_that_waited_until_prefill_gave_its_blocks_away(release):
    stock, ours = both(release, "waited")
    for name in ("soon", "late", "later"):
        assert said(stock[name]) == [(True, [])]
        assert said(ours[name]) == [(True, [] if name == "soon" else [name])]
        assert ours[name]["freed"] == [1]


@each_release
def test_settings_and_sizes(release):
    stock, ours = both(release, "settings")
    assert all(found["heard"][0]["done"] for found in stock.values())
    assert {found["raised"] for found in ours.values()} == {"ValueError"}
    for starts in both(release, "starts"):
        assert "must be greater than or equal to the decode_tp_size" in starts


@once
def schedulers(label: str, patches: str) -> dict:
    host = Host(label)
    code = START + (BUILT if label in BRANCHES else "") + opening(host)
    code += f"import ascend_kv_oldest\nfound = ascend_kv_oldest.everything({patches == PATCH})"
    return json.loads(host.run(code + ENDING, patches=patches).strip().splitlines()[-1])


@each_release
@pytest.mark.parametrize("scheduler", ["Scheduler", "RecomputeScheduler"])
def test_a_request_that_failed_on_a_worker_is_computed_by_the_scheduler(release, scheduler):
    """Its blocks go back to the pool, and never into the prefix cache."""
    stock = schedulers(release, "none")[scheduler]
    ours = schedulers(release, PATCH)[scheduler]
    print(stock, ours, sep="\n")
    loaded = {"ready": True, "computed": 12, "taken": 8, "cached": 12}
    assert stock["failed"] == stock["loaded"] == ours["loaded"] == loaded
    assert ours["failed"] == {"ready": True, "computed": 0, "taken": 4, "cached": 0, "again": 4}
    assert stock["left"] == ours["left"] == []


@each_release
def test_undo(release):
    found = results(release, PATCH)["reverted"]
    assert said(found) == [(True, [])]
    assert not any(found["right"])

"""MooncakeConnectorV1 of vllm_ascend, a process for each rank, over Mooncake's engine and TCP."""

from __future__ import annotations

import pytest
from ascend_kv_runs import PATCH, RELEASES, over_tcp

pytestmark = pytest.mark.slow

LOCAL = [1, 3, 5]
each_release = pytest.mark.parametrize("release", RELEASES)


def moved(found: dict, decode: int) -> bool:
    """All decode ranks have their own bytes, and each prefill rank was freed once."""
    print(found)
    assert len(found["heard"]) == len(found["right"]) == decode
    said = [(one["done"], one["invalid"], one["early"]) for one in found["heard"]]
    return all(found["right"]) and said == [(True, [], [])] * decode and set(found["freed"]) == {1}


def invalid(heard: list) -> list[float]:
    """No decode rank has anything, and all say so; how many seconds that took."""
    print(heard)
    assert [(one["done"], one["invalid"]) for one in heard] == [(True, LOCAL)] * len(heard)
    return [one["seconds"] for one in heard]


@each_release
def test_each_ratio(release):
    """The decode ranks' bytes are those of their own prefill, and no others."""
    for patches, count in (("none", 4), (PATCH, 6)):
        found = over_tcp(release, patches)["ratios"]
        assert len(found) == count
        for ratio, one in found.items():
            assert moved(one, int(ratio.split()[2].rstrip(","))), (patches, ratio)


@each_release
def test_more_ranges_than_the_engine_takes_at_once(release):
    """The release hands all of them over, is refused, and calls it done."""
    stock = over_tcp(release, "none")["many"]
    assert not moved(stock, 1)
    assert stock["heard"][0]["done"]
    ours = over_tcp(release, PATCH)["many"]
    assert len(ours) == 4
    for ratio, found in ours.items():
        assert moved(found, int(ratio[-1])), ratio


@each_release
def test_a_peer_without_the_shim(release):
    """What worked works; more decode ranks are moved where each prefill rank surely waits."""
    found = over_tcp(release, PATCH)
    assert moved(found["plain decode"]["2 -> 1"], 1)
    plain = found["plain prefill"]
    assert len(plain) == 5
    refused = plain.pop("2 -> 4, 1 heads")
    for ratio, one in plain.items():
        assert moved(one, int(ratio.split()[2].rstrip(","))), ratio
    invalid(refused["heard"])
    assert set(refused["freed"]) == {1}
    assert len(refused["lines"]) == 4
    assert all("needs ascend-patch on both sides" in line for line in refused["lines"])


@each_release
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_prefill_rank_that_ends_or_stops(release, fault):
    found = over_tcp(release, PATCH)[fault]
    assert moved(found["first"], 2)
    if fault == "killed":
        assert max(invalid(found["heard"])) < 20
    if fault == "stopped":
        # A read of a rank that has stopped is the engine's own to end. Its bytes arrive when the
        # rank goes on; until then the request has failed and its blocks are kept.
        for one, kept, ended in zip(found["heard"], found["kept"], found["ended"], strict=True):
            assert (one["done"], one["early"]) == (False, LOCAL)
            assert one["seconds"] < 55
            assert not kept["done"]
            assert ended["done"]
            assert ended["invalid"] == ended["early"] == []
        # What it was told in the meantime it hears when it goes on.
        assert found["freed"] == [[1]]
        assert moved(found["next"], 2)

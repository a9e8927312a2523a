"""MooncakeConnectorV1 of vllm_ascend: unpatched it calls a failed pull done; patched it says so."""

from __future__ import annotations

import pytest
from ascend_kv_runs import PATCH, RELEASES, both, check_moves, check_waited, results, said

pytestmark = pytest.mark.slow

LOCAL = [1, 3, 5]
# Their requests name no size of prefill's; from 0.18 on they do.
OLDER = tuple(release for release in RELEASES if "0.13" in release)
each_release = pytest.mark.parametrize("release", RELEASES)


@each_release
def test_what_the_release_moves_is_moved_as_before(release):
    check_moves(release)


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
    last = [line for line in ours["one"]["lines"] if line.startswith("kv pull")][-1]
    assert "TP 2" in last
    assert "3 blocks are invalid" in last


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
    for tokens in ("6", "8"):
        assert said(stock[tokens]) == [(True, [])] * 2
        assert not any(stock[tokens]["right"])
        assert said(ours[tokens]) == [(True, LOCAL)] * 2
        said_so = f"block size: prefill has 4, decode {tokens}"
        assert all(said_so in line for line in ours[tokens]["lines"])


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
def test_more_decode_ranks_than_prefill_ranks(release):
    """The release's worker does not start; ours moves them, and prefill counts its readers."""
    assert (
        "must be greater than or equal to the decode_tp_size" in results(release, "none")["starts"]
    )
    found = results(release, PATCH)["splits"]
    print(found)
    assert len(found) == 11
    for ratio, one in found.items():
        assert all(one["right"]), ratio
        assert len(one["right"]) == int(ratio.split()[2].rstrip(","))
        assert set(map(str, said(one))) == {"(True, [])"}, ratio
        assert set(one["freed"]) == {1}, ratio


@each_release
def test_blocks_are_free_when_the_last_decode_rank_has_read_them(release):
    found = results(release, PATCH)["split readers"]
    print(found)
    assert found["one"]["freed"] == [[0, 0], [1, 0], [0, 0], [0, 1]]
    assert all(found["one"]["right"])
    assert said(found["cached"]) == [(True, [])] * 4
    assert found["cached"]["freed"] == [1, 1]


@each_release
def test_a_decode_rank_that_fails_leaves_the_others_alone(release):
    found = results(release, PATCH)["split fails"]
    print(found)
    assert said(found["again"]) == [(True, [])] * 2
    assert all(found["again"]["right"])
    assert found["again"]["freed"] == [1]
    assert said(found) == [(True, LOCAL), (True, [])]
    assert found["freed"] == [1]


@each_release
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("would not wait", "decode.tp_size of prefill's kv_connector_extra_config says 1"),
        ("other blocks", "block size: prefill has 4, decode 8"),
        ("3 heads", "3 KV heads of layers 'model' cannot be cut"),
    ],
)
def test_what_more_decode_ranks_cannot_read_is_refused(release, case, says):
    found = results(release, PATCH)["split refused"][case]
    print(found)
    ranks = 4 if case == "would not wait" else 2
    assert said(found) == [(True, LOCAL)] * ranks
    assert not any(found["right"])
    assert set(found["freed"]) == {1}
    lines = [line for line in found["lines"] if line.startswith("kv pull")]
    assert len(lines) == ranks
    assert all(says in line for line in lines)


@each_release
def test_settings_that_make_no_sense_end_the_start(release):
    stock, ours = both(release, "settings")
    assert all(found["heard"][0]["done"] for found in stock.values())
    for name, found in ours.items():
        assert found["raised"] == "ValueError"
        assert found["says"].startswith(f"{name} in kv_connector_extra_config of kv_producer-")


@each_release
def test_who_does_not_answer_is_not_waited_for_each_time(release):
    """Three seconds and a bit for the first one; two are for what may still be written."""
    found = results(release, PATCH)["often"]
    print(found)
    assert [(done, invalid) for done, invalid, _ in found] == [(True, LOCAL)] * 2
    assert found[0][2] > 5
    assert found[1][2] < 4.5


@each_release
def test_a_request_that_waited_until_prefill_gave_its_blocks_away(release):
    stock, ours = both(release, "waited")
    check_waited(stock, ours, LOCAL)
    for name in ("soon", "late", "later"):
        assert stock[name]["told"] == {}
        assert len(ours[name]["told"].pop("ascend_patch_attempt")) == 16
        assert ours[name]["told"] == {"ascend_patch_keeps_s": 480.0}
    assert "ended 14 s ago, and they may be another's" in ours["late"]["lines"][0]
    assert "ended 34 s ago, and they may be another's" in ours["later"]["lines"][0]


@each_release
def test_undo(release):
    found = results(release, PATCH)["reverted"]
    assert said(found) == [(True, [])]
    assert not any(found["right"])

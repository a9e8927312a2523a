"""How vllm-ascend's decode ranks pull; on the real classes: tests/ascend."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from ascend_patch.impl import kv_ascend, kv_ascend_engine, kv_settings
from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_peers as peers
from ascend_patch.impl import kv_ascend_split as split
from ascend_patch.kernels.kv_layout import LayerGroup, Refusal, Side

PULL = {
    "request_id": "one",
    "remote_engine_id": "engine",
    "remote_host": "host",
    "remote_handshake_port": 1,
    "offset": 0,
}


def side(tp: int, heads: int, **given) -> Side:
    return Side((LayerGroup(2, heads, (8, 8)),), tp, **given)


@pytest.mark.parametrize(
    ("tp", "heads", "said", "waits"),
    [
        # Without the shim prefill names at most its own size.
        (1, 8, None, True),
        (2, 8, None, True),
        (2, 1, None, False),
        (4, 8, None, False),
        (4, 8, 3, False),
        (4, 8, 2, True),
        (4, 2, 2, False),
        (4, 2, 4, True),
        (4, 2, 8, True),
    ],
)
def test_which_prefill_servers_keep_what_several_decode_ranks_read(tp, heads, said, waits):
    assert split.all_wait(side(tp, heads), said) is waits


def test_each_prefill_rank_has_readers_where_decode_has_more():
    sizes = (1, 2, 3, 4, 6, 8, 12, 16)
    seen = 0
    for prefill, decode, heads, pp in itertools.product(sizes, sizes, sizes, (1, 2)):
        if prefill >= decode:
            continue
        given = checks.peer_side(side(decode, heads), tp=prefill, pp=pp, partition=None)
        for turn in range(3):
            found = split.planned(given, side(decode, heads), turn)
            if isinstance(found, Refusal):
                continue
            seen += 1
            counts = split.readers(found)
            assert min(counts) >= 1
            assert sum(counts) == sum(len(found.sources(rank)) for rank in range(decode))
    assert seen > 500


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (None, "needs ascend-patch on both sides"),
        ((side(4, 8), None), "says None, and some of its ranks would not wait; set it to 8"),
        ((side(4, 8), 3), "says 3, and some of its ranks would not wait; set it to 8"),
        ((side(2, 8), 8), "the prefill server has TP 2 and stages of (2,) layers"),
        ((side(4, 8, pp=2), 8), "stages of (1, 1) layers, and decode was told 4 and (2,)"),
        ((side(4, 8), 8), None),
        ((side(4, 8), 2), None),
    ],
)
def test_a_prefill_server_must_be_what_the_plan_is_for(told, says):
    plan = split.planned(side(4, 8), side(8, 8), 0)
    found = split._does_not_fit(told, plan)
    assert (found is None) == (says is None), found
    if found is not None:
        assert says in found
        assert found.startswith("prefill TP 4 -> decode TP 8")


def test_what_raises_in_a_pull_is_a_failure():
    """Whatever it is: nothing that ours does may leave a pull as if it were done."""
    thread = SimpleNamespace()  # it has no settings
    pull = {**PULL, "local_block_ids": [3]}
    with pytest.raises(AttributeError):
        kv_ascend.transfer_kv_cache(lambda _: None, thread, (pull,), {})
    assert failures.of(thread).blocks == {"one": {3}}


def test_the_receiving_thread_is_on_the_device_of_the_caches(monkeypatch):
    """Laying out anew waits for the current device, and a thread begins with the first one."""
    order = []
    monkeypatch.setattr(torch, "npu", SimpleNamespace(set_device=order.append), raising=False)
    cache = SimpleNamespace(device=torch.device("meta", 3))
    thread = SimpleNamespace(kv_caches={"layer": (cache, cache)}, tp_rank=0, tp_size=1)
    setattr(thread, kv_ascend.SETTINGS, kv_settings.Settings(0, 1.0))
    pull = {**PULL, "local_block_ids": [3]}
    kv_ascend.transfer_kv_cache(lambda _: order.append("moved"), thread, (pull,), {})
    assert order == ["moved"]
    cache.device = SimpleNamespace(type="npu", index=3)
    kv_ascend.transfer_kv_cache(lambda _: order.append("moved"), thread, (pull,), {})
    assert order == ["moved", cache.device, "moved"]


def test_an_engine_is_given_so_many_ranges_at_a_time():
    seen = []

    def take(session, local, remote, lengths):
        seen.append((session, local, remote, lengths))
        return -7 if 2500 in local else 0

    engine = kv_ascend_engine.InBatches(SimpleNamespace(batch_transfer_sync_read=take, other=5))
    numbers = list(range(2048))
    assert engine.batch_transfer_sync_read("s", numbers, numbers, numbers) == 0
    assert [len(local) for _, local, _, _ in seen] == [1024, 1024]
    assert [n for _, _, _, lengths in seen for n in lengths] == numbers
    numbers = list(range(4000))
    assert engine.batch_transfer_sync_read("s", numbers, numbers, numbers) == -7
    assert len(seen) == 2 + 3
    assert engine.other == 5


def test_who_does_not_answer_is_left_alone_for_longer_and_longer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    found = peers.Silence(engine="a")
    waits = []
    for _ in range(6):
        assert found.ask("host", 1) == 0
        found.silent()
        waits.append(found.ask("host", 1))
        now[0] += waits[-1]
    assert waits == [5, 10, 20, 40, 60, 60]
    found.ask("host", 1)
    found.silent()
    # Another rank, and a server that was started again, are others.
    assert found.ask("host", 2) == 0
    found.engine = "b"
    assert found.ask("host", 1) == 0
    found.engine = "a"
    assert found.ask("host", 1) == 60
    found.answered()
    assert found.ask("host", 1) == 0


def test_blocks_that_prefill_may_have_given_to_others_are_not_read(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(kept.time, "time", lambda: now[0])
    thread, reads = SimpleNamespace(tp_rank=0, tp_size=1), []
    thread.kv_caches = {"layer": (torch.zeros(1), torch.zeros(1))}
    thread.kv_caches_base_addr = thread.remote_te_port = {"engine": {}}
    setattr(thread, kv_ascend.SETTINGS, kv_settings.Settings(5, 60.0))
    kept.note(thread, {"one": SimpleNamespace(**{kept.UNTIL: 1010.0}), "two": SimpleNamespace()})

    def pull(request, seconds=0.0, blocks=(3,)):
        def read(_):
            reads.append(request)
            now[0] += seconds

        given = {**PULL, "request_id": request, "local_block_ids": list(blocks)}
        kv_ascend.transfer_kv_cache(read, thread, (given,), {})

    pull("one", 9.0)
    assert reads == ["one"]
    with pytest.raises(TimeoutError, match="ended 4 s ago, and they may be another's"):
        pull("one", 5.0)
    assert failures.of(thread).blocks.pop("one") == {3}
    with pytest.raises(TimeoutError, match="ended 4 s ago"):
        pull("one")
    assert reads == ["one"] * 2
    failures.of(thread).blocks.clear()
    # Nothing is read of a request whose blocks decode has, and of one that came without a time.
    pull("one", blocks=())
    pull("two")
    kept.forget(thread, {"one"})
    pull("one")
    assert reads == ["one", "one", "one", "two", "one"]

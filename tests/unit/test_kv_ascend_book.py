"""Which requests a prefill rank of vllm-ascend keeps, and what it is told of their reads."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from ascend_patch.impl import kv_ascend_admit as admit
from ascend_patch.impl import kv_ascend_book as books
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl.kv_ascend_limits import Done

PREFILL = limits.Prefill(tp=2, stages=1, named_request=True, kinds=False)
WHOLE = {
    "remote_block_ids": [0, 5],
    "remote_engine_id": "engine_dp0",
    "remote_host": "fe80::1%eth0",
    "remote_port": 5000,
    "remote_request_id": "cmpl-1",
    "remote_multi_nodes_meta_mapping": {"0": {"host": "10.0.0.1", "engine_id": "a"}},
}


class Tracker(SimpleNamespace):
    """The release's, as far as a book asks it."""

    def update_done_task_count(self, request):
        self.freed.append(request)
        del self.delayed_free_requests[request]


def book(*kept: str) -> books.Book:
    tracker = Tracker(delayed_free_requests=dict.fromkeys(kept, 0.0), freed=[])
    tracker.reqs_to_process = {"computed"}
    found = books.Book(tracker)
    found.announced({}, kept)
    return found


def test_several_pulls_of_one_rank_are_several_readers_and_one_pull_is_one():
    one = book("r")
    for pull in ("rank:0.3", "rank:0.3", "rank:1.7"):
        assert one.tracker.freed == []
        one.done(Done("r", needed=2, reader=pull))
    assert one.tracker.freed == ["r"]


def test_fewer_readers_than_another_message_named_free_nothing_sooner():
    one = book("r")
    one.done(Done("r", needed=3, reader="a"))
    one.done(Done("r", needed=1, reader="b"))
    assert one.tracker.freed == []
    one.done(Done("r", needed=3, reader="c"))
    assert one.tracker.freed == ["r"]


def test_what_is_remembered_of_messages_has_a_limit():
    one = book()
    for number in range(5000):
        one.done(Done("computed", reader=str(number)))
        one.done(Done(f"unknown {number}"))
    assert len(one.early) == books.EARLY
    assert one.readers == one.attempts == {}


def test_a_request_is_held_wait_or_gone():
    one = book("r")
    assert one.held("r", "") == books.HELD
    assert one.held("computed", "") == books.WAIT
    assert one.held("never", "") == books.GONE
    one.tracker.delayed_free_requests["again"] = 0.0
    one.announced({"again": "2"}, ["again"])
    assert [one.held("again", attempt) for attempt in "12"] == [books.GONE, books.HELD]


def test_a_rank_says_which_of_its_pulls_has_ended():
    said = []
    thread = SimpleNamespace(
        local_engine_id="d", tp_rank=1, local_handshake_port=9, decoder=SimpleNamespace()
    )
    thread.decoder.asked = threading.local()
    thread.decoder.asked.pull = "0.3"
    encoder = held.Encoder.__new__(held.Encoder)
    encoder._encode, encoder._thread = lambda message: said.append(message) or b"", thread
    encoder._done, encoder._reader = b"done", "d:1:9"
    encoder.encode((b"done", "r", {}))
    encoder.encode((b"other", "r"))
    assert said == [
        (b"done", "r", {}, {"ascend_patch": {"reader": "d:1:9:0.3", "attempt": ""}}),
        (b"other", "r"),
    ]


def test_parameters_that_a_release_sends_are_taken():
    limits.parameters(WHOLE, PREFILL)
    limits.parameters({**WHOLE, "remote_multi_nodes_meta_mapping": None}, PREFILL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"remote_port": 65535}, "the port of the last prefill rank"),
        ({"remote_port": "5000"}, "remote_port"),
        ({"remote_port": True}, "remote_port"),
        ({"remote_host": "*"}, "remote_host"),
        ({"remote_block_ids": [-1]}, "an id of remote_block_ids"),
        ({"remote_block_ids": "12"}, "remote_block_ids"),
        ({"remote_block_ids": []}, "missing or empty"),
        ({"remote_ptp_size": 10**9}, "remote_ptp_size"),
        ({"remote_ptp_size": 256, "remote_pcp_size": 200}, "no prefill server"),
        ({"remote_request_id": ""}, "missing or empty"),
        ({"remote_multi_nodes_meta_mapping": {"0": {}}}, "host of rank 0"),
    ],
)
def test_parameters_that_cannot_be_are_named(change, says):
    with pytest.raises(limits.LimitError, match=says):
        limits.parameters({**WHOLE, **change}, PREFILL)


def test_seconds_that_no_server_keeps_blocks_for_are_refused():
    assert limits.keeps(480) == 480.0
    for wrong in (0, -1, True, "480", float("nan"), float("inf"), 10**400, None):
        with pytest.raises(limits.LimitError):
            limits.keeps(wrong)


def test_only_a_server_that_sends_keeps_blocks_for_decode():
    def server(role):
        return SimpleNamespace(
            vllm_config=SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role=role))
        )

    assert admit.takes_decode(server("kv_producer"))
    assert not admit.takes_decode(server("kv_consumer"))

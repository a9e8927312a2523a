"""What the host's classes meet at start, and what its scheduler is told and reports."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from ascend_patch.impl import kv_vllm, kv_vllm_engine, kv_vllm_scheduler


def test_a_port_that_is_taken_is_a_sentence_and_not_a_wait() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = SimpleNamespace(server_thread=None, host="127.0.0.1", port=port)
        with pytest.raises(RuntimeError, match=f"Port {port} of 127.0.0.1 is taken"):
            kv_vllm.bootstrap_start(pytest.fail, server, (), {})


def test_a_free_port_starts_the_host_s_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = SimpleNamespace(server_thread=None, host="127.0.0.1", port=port)
    started: list[int] = []
    kv_vllm.bootstrap_start(lambda: started.append(1), server, (), {})
    # A server that runs already holds the port itself.
    server.server_thread = object()
    kv_vllm.bootstrap_start(lambda: started.append(2), server, (), {})
    assert started == [1, 2]


@pytest.mark.parametrize(
    ("protocol", "engine", "ours"),
    [
        ("tcp", SimpleNamespace(transfer_submit_write=None), True),
        ("rdma", SimpleNamespace(transfer_submit_write=None), False),
        ("tcp", SimpleNamespace(), False),
    ],
    ids=["tcp", "rdma", "an engine without it"],
)
def test_over_tcp_ranges_are_written_one_by_one(protocol, engine, ours, monkeypatch) -> None:
    extra = {"mooncake_protocol": protocol}
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    config = SimpleNamespace(kv_transfer_config=transfer)
    worker = SimpleNamespace(vllm_config=config, engine=engine)
    asked: list[tuple[bool, Any]] = []
    monkeypatch.setattr(
        kv_vllm_engine.Writer, "write", lambda _, *given: asked.append((True, given)) or -1
    )
    given = ("peer:1", [1, 2], [3, 4], [5, 6])
    host = lambda *given: asked.append((False, given)) or -1  # noqa: E731
    assert kv_vllm.send_blocks(host, worker, given, {}) == -1
    assert asked == [(ours, given)]


def test_the_workers_learn_the_prompt_s_length_and_what_of_it_is_cached() -> None:
    cache = SimpleNamespace(block_size=16)
    scheduler: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=cache), _reqs_need_recv={}
    )

    def alloc(request: Any, blocks: Any, num_external_tokens: int) -> None:
        scheduler._reqs_need_recv[request.request_id] = (request, blocks)

    request = SimpleNamespace(request_id="r", prompt_token_ids=list(range(100)))
    given = (request, [7, 8], 52)
    kv_vllm_scheduler.update_state_after_alloc(alloc, scheduler, given, {})
    aborted = SimpleNamespace(request_id="a", prompt_token_ids=[1])
    kv_vllm_scheduler.update_state_after_alloc(alloc, scheduler, (aborted, [], 0), {})
    metas = {"r": SimpleNamespace(), "a": SimpleNamespace()}
    built = kv_vllm_scheduler.build_connector_meta(
        lambda: SimpleNamespace(reqs_to_recv={"engine": metas}), scheduler, (), {}
    )
    found = built.reqs_to_recv["engine"]
    assert vars(found["r"]) == {"ascend_patch_tokens": 100, "ascend_patch_cached": 3}
    assert vars(found["a"]) == {"ascend_patch_tokens": None, "ascend_patch_cached": None}
    assert not vars(scheduler)["ascend_patch_pulls"]


def test_a_failed_request_counts_no_cached_tokens() -> None:
    requests = {name: SimpleNamespace(num_cached_tokens=n) for name, n in (("a", -1), ("b", 5))}
    scheduler = SimpleNamespace(requests=requests)
    found = kv_vllm_scheduler.handle_invalid_blocks(
        lambda _: {"a", "b", "gone"}, scheduler, ({1},), {}
    )
    assert found == {"a", "b", "gone"}
    assert [one.num_cached_tokens for one in requests.values()] == [0, 5]


def test_vllm_s_counters_refuse_what_it_reports_without_this() -> None:
    stats = pytest.importorskip("vllm.v1.metrics.stats", reason="vLLM is not installed here")
    found = {}
    for cached in (-1, 0):
        counted = stats.PromptTokenStats()
        counted.update_from_output(cached, 0, 200)
        found[cached] = min(counted.get_by_source(one) for one in counted.ALL_SOURCES)
    assert found[-1] < 0
    assert found[0] == 0

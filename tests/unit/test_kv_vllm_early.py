"""vLLM 0.13 to 0.15: sizes that differ are refused, and what fails is said, in a bounded time.

The host's classes of these releases need their own vLLM; here is what our code uses of them.
"""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from ascend_patch.impl import kv_vllm, kv_vllm_early, kv_vllm_quarantine

msgspec = pytest.importorskip("msgspec", reason="msgspec comes with vLLM")
zmq_asyncio = pytest.importorskip("zmq.asyncio", reason="ZMQ comes with vLLM")

BLOCKS = [4, 5]


class MooncakeAgentMetadata(msgspec.Struct, omit_defaults=True):
    """The host's message; `receive_kv` looks for it beside the worker's class."""

    remote_hostname: str
    remote_port: int
    request_ids: list[str]
    kv_caches_base_addr: list[int]
    block_ids: list[list[int]]


def config(**extra: Any) -> Any:
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    return SimpleNamespace(kv_transfer_config=transfer)


class Worker:
    """What is used of MooncakeConnectorWorker."""

    def __init__(self, timeout: float = 5.0) -> None:
        kv_vllm_early.worker_init(lambda *_: None, self, (config(pull_timeout_s=timeout), "e"), {})
        self.tp_rank, self.tp_size = 0, 2
        self.hostname, self.rpc_port, self.kv_caches_base_addr = "127.0.0.1", 1, [16]
        self.finished_recving_reqs: Any = set()
        self.async_zmq_ctx = zmq_asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()


def meta(size: int | None) -> Any:
    return SimpleNamespace(
        local_block_ids=BLOCKS, remote_host="host", remote_port=7, ascend_patch_tp=size
    )


def test_settings_are_read_before_the_host_begins() -> None:
    worker = SimpleNamespace()
    began: list[Any] = []
    kv_vllm_early.worker_init(lambda *given: began.append(given), worker, (config(), "e"), {})
    assert vars(worker) == {kv_vllm.SETTINGS: (2, 60.0, 0.25)}
    with pytest.raises(ValueError, match="pull_timeout_s in kv_connector_extra_config of e is"):
        kv_vllm_early.worker_init(pytest.fail, worker, (config(pull_timeout_s="9"), "e"), {})
    assert len(began) == 1


def test_a_prefill_server_tells_its_size_to_decode() -> None:
    parallel = SimpleNamespace(tensor_parallel_size=4)
    scheduler = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    told = kv_vllm_early.request_finished(lambda: (True, {"remote_port": 7}), scheduler, (), {})
    assert told == (True, {"remote_port": 7, "ascend_patch_tp_size": 4})
    assert kv_vllm_early.request_finished(lambda: (False, None), scheduler, (), {}) == (False, None)

    request = SimpleNamespace(kv_transfer_params=told[1])
    scheduler._reqs_need_recv = {
        "r": (request, BLOCKS),
        "s": (SimpleNamespace(kv_transfer_params={}), BLOCKS),
    }

    def build() -> Any:
        found = {name: meta(None) for name in scheduler._reqs_need_recv}
        scheduler._reqs_need_recv.clear()
        return SimpleNamespace(reqs_to_recv=found)

    built = kv_vllm_early.build_connector_meta(build, scheduler, (), {})
    assert [one.ascend_patch_tp for one in built.reqs_to_recv.values()] == [4, None]


@pytest.mark.parametrize("locked", [False, True], ids=["0.15", "0.13"])
def test_sizes_that_differ_are_refused_and_others_pulled(locked) -> None:
    worker = Worker()
    if locked:
        worker.finished_recving_reqs = SimpleNamespace(set=set(), lock=None)
    wanted = {"differs": meta(4), "equal": meta(2), "unknown": meta(None)}
    metadata = SimpleNamespace(reqs_to_recv=dict(wanted))
    pulled = kv_vllm_early.group_kv_pull(
        lambda one: list(one.reqs_to_recv), worker, (metadata,), {}
    )
    assert pulled == ["equal", "unknown"]
    done = worker.finished_recving_reqs
    assert (done.set if locked else done) == {"differs"}
    connector = SimpleNamespace(connector_worker=worker)
    assert kv_vllm.load_errors(lambda: {1}, connector, (), {}) == {1, *BLOCKS}
    assert kv_vllm.load_errors(lambda: set(), connector, (), {}) == set()


@pytest.mark.parametrize("locked", [False, True], ids=["0.15", "0.13"])
def test_a_request_that_is_gone_is_an_error(locked) -> None:
    requests: Any = {"here": 1}
    worker = SimpleNamespace(reqs_need_send=SimpleNamespace(reqs=requests) if locked else requests)

    def send(asked: list[str]) -> Any:
        given = (SimpleNamespace(request_ids=asked),)
        return kv_vllm_early.send_kv_to_decode(lambda _: "sent", worker, given, {})

    assert send(["here"]) == "sent"
    with pytest.raises(RuntimeError, match=r"requests \['gone'\] are not here"):
        send(["here", "gone"])


class Peer:
    """A prefill rank's side channel: answers, or is silent until it is told to answer."""

    def __init__(self, context: Any, answer: bytes | None) -> None:
        import zmq

        self.answer, self.asked = answer, asyncio.Event()
        self.socket = context.socket(zmq.ROUTER)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.path = f"tcp://127.0.0.1:{self.port}"
        self.task = asyncio.ensure_future(self.serve())

    async def serve(self) -> None:
        # As the host unpacks it: a REQ socket's empty frame between.
        self.identity, empty, body = await self.socket.recv_multipart()
        assert empty == b""
        self.message = msgspec.msgpack.decode(body, type=MooncakeAgentMetadata)
        self.asked.set()
        if self.answer is not None:
            await self.say(self.answer)

    async def say(self, answer: bytes) -> None:
        await self.socket.send_multipart([self.identity, b"", answer])


async def pulled(worker: Worker, path: str) -> None:
    await kv_vllm_early.receive_kv(lambda: None, worker, (path, [("r", BLOCKS)]), {})


def invalid(worker: Worker) -> set[int]:
    return kv_vllm_early.failures(worker).take_invalid()


@pytest.mark.parametrize(("answer", "lost"), [(b"trans_done", set()), (b"trans_error", {*BLOCKS})])
def test_an_answer_ends_the_pull(answer, lost) -> None:
    async def run() -> None:
        worker = Worker()
        peer = Peer(worker.async_zmq_ctx, answer)
        await pulled(worker, peer.path)
        assert peer.message.request_ids == ["r"]
        assert peer.message.block_ids == [BLOCKS]
        assert worker.finished_recving_reqs == {"r"}
        assert invalid(worker) == lost
        worker.async_zmq_ctx.destroy(0)

    asyncio.run(run())


def test_silence_fails_the_request_and_keeps_its_blocks_until_it_ends() -> None:
    async def run() -> None:
        worker = Worker(timeout=0.2)
        peer = Peer(worker.async_zmq_ctx, None)
        pull = asyncio.ensure_future(pulled(worker, peer.path))
        await peer.asked.wait()
        await asyncio.sleep(0.5)
        assert invalid(worker) == set(BLOCKS)
        assert not worker.finished_recving_reqs
        await peer.say(b"trans_done")
        await asyncio.wait_for(pull, 5)
        assert worker.finished_recving_reqs == {"r"}
        assert not invalid(worker)
        worker.async_zmq_ctx.destroy(0)

    asyncio.run(run())


def test_nobody_listening_fails_the_request(monkeypatch) -> None:
    monkeypatch.setattr(kv_vllm_quarantine, "SETTLE_S", 0.05)

    async def run() -> None:
        worker = Worker()
        await asyncio.wait_for(pulled(worker, "tcp://127.0.0.1:1"), 5)
        assert invalid(worker) == set(BLOCKS)
        assert worker.finished_recving_reqs == {"r"}
        worker.async_zmq_ctx.destroy(0)

    asyncio.run(run())


def test_failures_are_taken_once_by_another_thread() -> None:
    found = kv_vllm_early.Failures()
    taken: list[set[int]] = []
    found.add([1, 2])
    thread = threading.Thread(target=lambda: taken.append(found.take_invalid()))
    thread.start()
    thread.join()
    assert taken == [{1, 2}]
    assert not found.take_invalid()

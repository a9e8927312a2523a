"""Known faults of vLLM's connector, each with a real listener and a peer that the test plays."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import kv_peer
import msgspec
import pytest
from kv_peer import Peer, Prefill
from kv_ranks import D_BLOCKS, P_BLOCKS, World, wait_until

from ascend_patch.impl import kv_vllm
from ascend_patch.impl.kv_vllm_wire import ACCEPTED, ASK, CANCEL, DONE, FAILED, GO, READY

NEWER = 4200


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's connector module."""
    return kv_peer.connector(monkeypatch)


def sender_of(world: World, rank: int = 0) -> Any:
    """What pushes for a prefill rank."""
    return getattr(world.prefill[rank].worker, kv_vllm.SENDER)


@pytest.mark.fault("write_in_flight_is_forgotten")
def test_a_write_in_flight_outlives_newer_attempts(host) -> None:
    """The answer to `go` of a job that writes is never that it has ended."""

    async def run() -> None:
        async with World(host, 1, 1) as world:
            sender_of(world).waiter.timeout = 600
            await world.prefilled(1, P_BLOCKS)
            engine = world.prefill[0].engine
            engine.hold.clear()
            with Peer(world) as peer:
                await peer.say(ASK, "old", transfer="t1")
                assert await peer.hear("old") == ACCEPTED
                assert await peer.hear("old") == READY
                await peer.say(GO, "old", transfer="t1")
                await wait_until(engine.writing.is_set)
                for number in range(NEWER):
                    await peer.say(ASK, f"e{number}", transfer=f"u{number}")
                    await peer.hear(f"e{number}")
                await peer.say(GO, "old", transfer="t1")
                # Asked again while it writes: silence, and not that it has ended.
                assert await peer.hear("old", 1.0) is None
                engine.hold.set()
                assert await peer.hear("old", 10) == DONE

    asyncio.run(run())


@pytest.mark.fault("write_in_flight_is_forgotten")
def test_when_all_records_are_live_a_new_attempt_is_refused(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1) as world:
            sender_of(world).waiter.timeout = 600
            with Peer(world) as peer:
                answers = []
                for number in range(NEWER):
                    await peer.say(ASK, f"e{number}", transfer=f"u{number}")
                    answers.append(await peer.hear(f"e{number}"))
                sender = sender_of(world)
                assert answers == [ACCEPTED] * 4096 + [FAILED] * (NEWER - 4096)
                assert "transfers from this prefill rank are under way" in peer.last.err_msg
                assert peer.last.ascend_patch["again"]
                # Nothing is kept of what was refused, and those that were accepted are served.
                assert len(sender.jobs) == len(sender.records) == 4096
                await peer.say(CANCEL, "e7", transfer="u7")
                assert await peer.hear("e7") == FAILED
                await peer.say(ASK, "later", transfer="later")
                assert await peer.hear("later") == ACCEPTED

    asyncio.run(run())


@pytest.mark.fault("write_in_flight_is_forgotten")
def test_restarted_is_said_of_another_nonce_alone(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1) as world:
            with Peer(world) as peer:
                await peer.say(GO, "unknown", transfer="t", nonce=sender_of(world).said["nonce"])
                assert await peer.hear("unknown") == FAILED
                assert "restarted" not in peer.last.err_msg
                await peer.say(GO, "unknown", transfer="t", nonce="another")
                assert await peer.hear("unknown") == FAILED
                assert "restarted" in peer.last.err_msg

    asyncio.run(run())


SIZES = [
    ("tp", 8000),
    ("tp", 40000),
    ("tp", 2**63),
    ("pp", 30_000_000),
    ("block_size", 2**63),
    ("itemsize", -1),
    ("context_parallel", 10**9),
]


@pytest.mark.fault("planning_cost_is_unbounded")
@pytest.mark.parametrize(("field", "value"), SIZES, ids=str)
def test_a_message_with_any_number_is_answered_at_once(host, field, value) -> None:
    """CPU time of the listener's thread, for one message with a number out of range."""

    async def run() -> None:
        async with World(host, 1, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            with Peer(world) as peer:
                began = time.thread_time()
                await peer.say(ASK, "e", transfer="t1", side={field: value})
                found = await peer.hear("e", 60)
                if found == ACCEPTED:
                    found = await peer.hear("e", 60)
                assert time.thread_time() - began < 1.0
                assert found == FAILED
                assert f"{field} is " in peer.last.err_msg
                # A well-behaved peer is served.
                await peer.say(ASK, "good", transfer="t1")
                assert await peer.hear("good", 10) == ACCEPTED

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.mark.fault("planning_cost_is_unbounded")
def test_the_largest_sizes_cost_little(host) -> None:
    limits = importlib.import_module("ascend_patch.impl.kv_limits")

    async def run() -> None:
        async with World(host, 1, 1) as world:
            with Peer(world) as peer:
                began = time.thread_time()
                for number in range(50):
                    tp = limits.MAX_TP - number
                    await peer.say(ASK, f"e{number}", transfer=f"t{number}", side={"tp": tp})
                    await peer.hear(f"e{number}", 10)
                assert (time.thread_time() - began) / 50 < 0.03

    asyncio.run(run())


@pytest.mark.fault("cancel_grows_records")
def test_cancelling_what_nobody_asked_for_keeps_nothing(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1) as world:
            sender = sender_of(world)
            with Peer(world) as peer:
                for number in range(2000):
                    await peer.say(CANCEL, f"e{number}", transfer=f"u{number}")
                await peer.say(ASK, "last", transfer="t")
                assert await peer.hear("last", 10) == ACCEPTED
                assert len(sender.records) == 1
                assert len(sender.jobs) == 1

    asyncio.run(run())


def kept(world: World) -> int | None:
    """How many blocks the decode rank says that it keeps; None where it does not count them."""
    quarantine = getattr(world.receivers[0], "quarantine", None)
    return None if quarantine is None else quarantine.snapshot()["blocks"]


async def garbage(prefill: Prefill) -> None:
    for _ in range(2):
        await prefill.send(b"\xc1 no message")


async def fieldless(prefill: Prefill) -> None:
    await prefill.send(msgspec.msgpack.encode({"status": 2, "err_msg": "something is wrong"}))


async def another_nonce(prefill: Prefill) -> None:
    await prefill.say(FAILED, "no", nonce="another")


async def forgotten(prefill: Prefill) -> None:
    """What ascend-patch 0.1.0 says of an attempt that it has forgotten and writes for."""
    await prefill.say(FAILED, "this prefill server was restarted meanwhile", again=True)


async def silence(prefill: Prefill) -> None:
    """The control: this was right before."""


@pytest.mark.fault("blocks_given_back_too_early")
@pytest.mark.parametrize("answer", [garbage, fieldless, another_nonce, forgotten, silence])
def test_blocks_are_kept_until_the_writer_says_that_it_has_ended(host, answer) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=1.0, retries=0) as world:
            world.receivers[0].repeat = 0.2
            with Prefill(world) as prefill:
                await world.pull(1, D_BLOCKS)
                await prefill.allowed()
                await answer(prefill)
                invalid: set[int] = set()
                await wait_until(lambda: bool(invalid.update(world.invalid()) or invalid))
                # The request has ended, in a bounded time; its blocks are kept.
                assert invalid == set(D_BLOCKS)
                await asyncio.sleep(1.5)
                assert not world.pulled(1)
                assert kept(world) in (len(D_BLOCKS), None)
                await prefill.hear(GO)
                await prefill.say(DONE)
                await wait_until(lambda: world.pulled(1))
                assert kept(world) in (0, None)

    asyncio.run(run())


@pytest.mark.fault("blocks_given_back_too_early")
def test_a_lost_connection_alone_is_no_end_of_a_writer(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=1.0, retries=0) as world:
            world.receivers[0].repeat = 0.2
            prefill = Prefill(world)
            with prefill:
                await world.pull(1, D_BLOCKS)
                await prefill.allowed()
            with listening(prefill.port):
                # Longer than what is still in a socket is waited for.
                await asyncio.sleep(4.5)
                assert not world.pulled(1)
                assert world.invalid() == set(D_BLOCKS)
            # Its host says that nobody is there.
            await wait_until(lambda: world.pulled(1), 30)

    asyncio.run(run())


def listening(port: int) -> socket.socket:
    """A process that listens at a port which was in use just now."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deadline = time.monotonic() + 5
    while True:
        try:
            found.bind(("127.0.0.1", port))
            break
        except OSError:
            assert time.monotonic() < deadline
    found.listen()
    return found


@pytest.mark.fault("blocks_given_back_too_early")
def test_above_the_cap_new_pulls_are_refused_and_served_again_below_it(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=1.0, retries=0) as world:
            world.receivers[0].repeat = 0.2
            right = dict(world.addresses)
            with Prefill(world) as prefill:
                await world.pull(1, D_BLOCKS)
                await prefill.allowed()
                await wait_until(lambda: bool(world.receivers[0].quarantine.blocks))
                world.receivers[0]._agents.clear()
                world.addresses = right
                await world.prefilled(2, P_BLOCKS)
                await world.pull(2, [0, 1, 2])
                await wait_until(lambda: world.pulled(2))
                assert {0, 1, 2} <= world.invalid()
                assert world.untouched([])
                await prefill.say(DONE)
                await wait_until(lambda: world.pulled(1))
            await world.pull(3, [0, 1, 2])
            await world.prefilled(3, P_BLOCKS)
            await wait_until(lambda: world.pulled(3))
            assert world.right(3, [0, 1, 2])

    asyncio.run(run())


@pytest.mark.fault("nonsense_address_leaks_sockets")
@pytest.mark.parametrize("address", ["nonsense", "tcp://nowhere", "ipc://"])
def test_an_address_that_cannot_be_used_leaves_nothing_behind(host, address) -> None:
    async def run() -> None:
        async with World(host, 2, 1, retries=0) as world:
            world.addresses[1] = address

            async def pull(number: int) -> None:
                await world.pull(number, D_BLOCKS)
                await wait_until(lambda: world.pulled(number))

            await pull(0)
            await asyncio.sleep(0.2)
            files, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
            for number in range(1, 21):
                await pull(number)
            # What ZMQ closes, it closes in a thread of its own.
            await wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files + 4)
            assert len(asyncio.all_tasks()) <= tasks

    asyncio.run(run())


NAMES = re.compile("[A-Za-z]*(Error|Iteration|Exception)|object|Traceback|index|__|attribute")


@pytest.mark.fault("internal_errors_are_sent_to_peers")
@pytest.mark.parametrize(
    "changes",
    [
        {"req_blocks": {}},
        {"puller": None},
        {"hostname": 5},
        {"side": {"groups": [3]}},
        {"side": {"groups": [{"name": "model"}]}},
        {"kv_caches_base_addr": [1]},
        {"num_blocks": None},
        {"num_blocks": "9"},
        {"remote_tp_rank": 7},
        {"tokens": "many"},
        {"req_blocks": {"d1": ("t1", [-1])}},
    ],
    ids=str,
)
def test_what_a_peer_is_told_is_a_sentence(host, changes) -> None:
    async def run() -> None:
        async with World(host, 1, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            with Peer(world) as peer:
                await peer.say(ASK, "e", transfer="t1", **changes)
                while await peer.hear("e") in (ACCEPTED, READY):
                    await peer.say(GO, "e", transfer="t1")
                sentence = peer.last.err_msg
                assert sentence
                assert not NAMES.search(sentence), sentence
                assert world.untouched([])

    asyncio.run(run())


def test_a_message_of_several_frames_ends_no_listener(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1) as world:
            with Peer(world) as peer:
                await peer.socket.send_multipart([b"one", b"two"])
                await peer.socket.send(b"\xc1")
                await peer.say(ASK, "e", transfer="t1")
                while await peer.hear("e") is None:
                    assert peer.last.status == 2
                assert peer.last.ascend_patch["state"] == ACCEPTED

    asyncio.run(run())


def test_a_listener_that_fails_goes_on(host, monkeypatch) -> None:
    listen = importlib.import_module("ascend_patch.impl.kv_vllm_listen")
    take, failed = listen.Listener._take, []

    async def fail(self: Any, *message: Any) -> None:
        if not failed:
            failed.append(message)
            raise OSError("the test's own")
        await take(self, *message)

    async def run() -> None:
        monkeypatch.setattr(listen.Listener, "_take", fail)
        monkeypatch.setattr(listen, "RESTART_S", 0.05)
        async with World(host, 1, 1) as world:
            with Peer(world) as peer:
                await peer.say(ASK, "e", transfer="t1")
                assert await peer.hear("e", 0.5) is None
                await peer.say(ASK, "e", transfer="t1")
                assert await peer.hear("e") == ACCEPTED

    asyncio.run(run())
    assert failed


def test_unpatched_peers_that_wait_stop_nobody_else(host) -> None:
    """The host has a few tasks for them, which all wait until their requests come."""

    async def run() -> None:
        async with World(host, 1, 1) as world:
            with Peer(world) as unpatched, Peer(world) as peer:
                for number in range(50):
                    found = unpatched.message(ASK, "e", f"u{number}")
                    del found["ascend_patch"]
                    found["remote_hostname"] = "127.0.0.1"
                    await unpatched.socket.send(msgspec.msgpack.encode(found))
                await asyncio.sleep(0.2)
                await peer.say(ASK, "e", transfer="t1")
                assert await peer.hear("e") == ACCEPTED

    asyncio.run(run())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as found:
            found.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.fault("ipv6")
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_transfer_over_ipv6(host) -> None:
    async def run() -> None:
        world = World(host, 1, 1)
        world.prefill[0].worker.hostname = world.decode[0].worker.hostname = "::1"
        async with world:
            world.addresses[0] = f"tcp://[::1]:{world.prefill[0].worker.side_channel_port}"
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


@pytest.mark.fault("ipv6")
def test_an_address_that_cannot_be_bound_is_named(host) -> None:
    """It is of a network for documentation: no machine has it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def make() -> World:
        return World(host, 1, 1)

    world = asyncio.run_coroutine_threadsafe(make(), loop).result(10)
    rank = world.prefill[0]
    rank.worker.hostname = "2001:db8::7"
    rank.worker.async_zmq_ctx, rank.worker.sender_loop = world.context, loop
    try:
        with pytest.raises(RuntimeError) as caught:
            kv_vllm._listen(rank.worker, rank.side, "model", list(rank.cache))
        assert "[2001:db8::7]" in str(caught.value)
        assert "VLLM_MOONCAKE_BOOTSTRAP_PORT" not in str(caught.value)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        world.context.destroy(0)


def test_a_loop_that_does_not_answer_stops_no_step_for_long(host) -> None:
    finished = importlib.import_module("ascend_patch.impl.kv_vllm_finished")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    held = threading.Event()

    async def fetch() -> set[str]:
        return {"r"}

    worker = SimpleNamespace(
        is_kv_producer=False,
        is_kv_consumer=True,
        tp_rank=0,
        receiver_loop=loop,
        fetch_finished_recving_reqs=fetch,
    )
    step = lambda: finished.get_finished(pytest.fail, worker, (), {})  # noqa: E731
    assert step() == (None, {"r"})
    loop.call_soon_threadsafe(held.wait, 30)
    began = time.monotonic()
    assert [step() for _ in range(50)] == [(None, None)] * 50
    assert time.monotonic() - began < 10
    held.set()
    # Nothing is lost: what was asked for meanwhile is given.
    deadline = time.monotonic() + 10
    while (found := step()) == (None, None):
        assert time.monotonic() < deadline
    assert found == (None, {"r"})
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)

"""Known faults of vLLM's connector, each with a real listener and a peer that the test plays."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Iterator
from typing import Any

import kv_peer
import pytest
from kv_peer import Peer
from kv_ranks import P_BLOCKS, World, wait_until

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
                # Some were ended by an error of Python's, which a test of its own is about.
                assert await peer.hear("e", 60) in (FAILED, None)
                assert time.thread_time() - began < 1.0
                assert peer.last.err_msg
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

"""Transfers that meet faults: each has an end, a sentence, and blocks that are freed once."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import kv_ranks
import pytest
from kv_ranks import D_BLOCKS, P_BLOCKS, World, wait_until

from ascend_patch.impl import (
    kv_vllm,
    kv_vllm_link,
    kv_vllm_send,
)
from ascend_patch.impl.kv_vllm_wire import CANCEL, DONE, GO

# Nothing listens there: the port belongs to no service.
DEAD = "tcp://127.0.0.1:1"


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (1, 1)], ids=str)
def test_lost_and_doubled_messages_change_nothing(kv_host, sizes, monkeypatch, kv_lines) -> None:
    kv_lines.set_level(logging.DEBUG, logger="vllm")
    count = 0

    def losing(send: Any) -> Any:
        async def lose(self: Any, *args: Any) -> None:
            nonlocal count
            count += 1
            for _ in range((0, 2, 0, 1, 0)[count % 5]):
                await send(self, *args)

        return lose

    async def run() -> None:
        async with World(kv_host, *sizes, timeout=30) as world:
            for receiver in world.receivers:
                receiver.repeat = 0.05
            # An equal pair asks once until it has heard that the peer is patched.
            for receiver in world.receivers:
                receiver.patched.add(kv_ranks.PREFILL)
            monkeypatch.setattr(kv_vllm_link.Link, "send", losing(kv_vllm_link.Link.send))
            monkeypatch.setattr(kv_vllm_send.Sender, "_repeat", losing(kv_vllm_send.Sender._repeat))
            for number in range(3):
                await world.prefilled(number, P_BLOCKS)
                await world.pull(number, D_BLOCKS)
                await wait_until(lambda n=number: world.pulled(n) and world.freed(n), 30)
                assert world.right(number, D_BLOCKS)
            assert not world.invalid()

    asyncio.run(run())
    assert count > 20
    ratio = "prefill TP {} -> decode TP {}, decode rank 0".format(*sizes)
    again = rf"{ratio}, .*: no word from prefill rank \d at tcp://127\.0\.0\.1:\d+; saying it"
    assert re.search(again, kv_lines.text)
    sides = rf"prefill rank \d \(TP {sizes[0]}\) -> decode rank \d \(TP {sizes[1]}\)"
    assert re.search(rf"{sides} of decode-engine, .*: asked again; answering", kv_lines.text)


def test_an_engine_that_fails_is_asked_again(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            world.prefill[1].engine.codes = [-1]
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)
            # What had arrived is not sent again.
            assert world.prefill[0].engine.calls == 1

    asyncio.run(run())
    assert "prefill TP 2 -> decode TP 1, decode rank 0" in kv_lines.text
    assert "prefill rank 1 at tcp://127.0.0.1:" in kv_lines.text
    assert "transfer engine returned -1; asking again (2 left)" in kv_lines.text


def test_the_last_word_of_an_attempt_is_asked_for_again_where_it_is_lost(
    kv_host, kv_lines, monkeypatch
) -> None:
    say, lost = kv_vllm_send.Sender._repeat, []

    async def lose(self: Any, job: Any) -> None:
        if job.state == DONE and not lost:
            lost.append(job)
            return
        await say(self, job)

    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            world.receivers[0].repeat = 0.05
            monkeypatch.setattr(kv_vllm_send.Sender, "_repeat", lose)
            writes, fails = (rank.engine for rank in world.prefill)
            writes.hold.clear()
            fails.codes = [-1]
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: writes.writing.is_set() and "asking again" in kv_lines.text)
            writes.hold.set()
            await wait_until(lambda: world.pulled(1) and world.freed(1), 5)
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())
    assert lost


def test_an_attempt_that_was_allowed_in_vain_is_over_when_it_is_given_up(
    kv_host, kv_lines, monkeypatch
) -> None:
    say, lost = kv_vllm_link.Link.send, []

    async def lose(self: Any, message: Any) -> None:
        if message.ascend_patch["kind"] == GO and (not lost or self in lost):
            lost.append(self)
            return
        await say(self, message)

    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            monkeypatch.setattr(kv_vllm_link.Link, "send", lose)
            await world.prefilled(1, P_BLOCKS)
            for rank in world.prefill:
                rank.engine.codes = [-1]
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1), 5)
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())
    assert lost
    assert "asking again" in kv_lines.text


def test_an_engine_that_goes_on_failing_fails_the_request_and_frees_both_sides(
    kv_host, kv_lines
) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=1) as world:
            world.prefill[0].engine.codes = [-1] * 9
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.prefill[0].engine.calls == 2
            assert world.invalid() == set(D_BLOCKS)
            assert not any(rank.worker.reqs_need_send for rank in world.prefill)

    asyncio.run(run())
    named = "prefill rank 0 (TP 2) -> decode rank 0 (TP 1) of decode-engine, requests ['d1']: "
    assert f"{named}given up by the decode rank so far" in kv_lines.text
    assert f"{named}given up by the decode rank\n" in kv_lines.text


def test_blocks_are_kept_while_a_push_that_stopped_may_go_on(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, timeout=0.5) as world:
            world.prefill[1].engine.hold.clear()
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            found: set[int] = set()
            await wait_until(lambda: bool(found.update(world.invalid()) or found))
            assert found == set(D_BLOCKS)
            await asyncio.sleep(0.5)
            assert not world.pulled(1)
            world.prefill[1].engine.hold.set()
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            # Reported once.
            assert not world.invalid()

    asyncio.run(run())
    assert "there was no answer within 0.5 s" in kv_lines.text
    assert "prefill ranks [1] may still be writing; its blocks are kept" in kv_lines.text


def test_a_prefill_that_never_computes_is_given_up_in_time(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, timeout=0.5) as world:
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            assert world.invalid() == set(D_BLOCKS)
            # It comes too late: its blocks are freed at once, and nobody is written to.
            await world.prefilled(1, P_BLOCKS)
            await wait_until(lambda: world.freed(1))
            assert world.untouched([])

    asyncio.run(run())


def test_a_question_that_is_heard_with_its_withdrawal_frees_the_blocks(
    kv_host, monkeypatch
) -> None:
    handle, unread = kv_vllm_send.Sender.handle, []

    async def keep(self: Any, *message: Any) -> None:
        unread.append((self, *message))

    async def run() -> None:
        async with World(kv_host, 2, 1, timeout=0.5, retries=0) as world:
            # The ranks are stopped: what they are sent waits in their sockets.
            monkeypatch.setattr(kv_vllm_send.Sender, "handle", keep)
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: [m[-1].ascend_patch["kind"] for m in unread].count(CANCEL) > 1)
            await wait_until(lambda: world.pulled(1))
            assert not world.freed(1)
            for message in unread:
                await handle(*message)
            await wait_until(lambda: world.freed(1), 5)
            assert all(rank.engine.calls == 0 for rank in world.prefill)

    asyncio.run(run())


def test_a_prefill_that_ends_with_nothing_to_send_says_so_at_once(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.pull(1, D_BLOCKS)
            await asyncio.sleep(0.1)
            for rank in world.prefill:
                await world.record(rank, 1, [])
                metadata = kv_host.MooncakeConnectorMetadata()
                metadata.reqs_not_processed.add("t1")
                await rank.worker.record_send_reqs(metadata)
            await wait_until(lambda: world.pulled(1), 5)
            assert world.invalid() == set(D_BLOCKS)

    asyncio.run(run())
    assert "the prefill server ended the request with nothing to send" in kv_lines.text


def test_nobody_listening_is_found_out_and_the_address_is_asked_again(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=50) as world:
            right, world.addresses = dict(world.addresses), {0: world.addresses[0], 1: DEAD}
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: "asking again" in kv_lines.text)
            world.addresses = right
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())
    assert f"the connection to {DEAD} was refused or ended" in kv_lines.text


def test_a_request_whose_blocks_expired_is_refused_at_once(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=0) as world:
            await world.prefilled(1, P_BLOCKS)
            for rank in world.prefill:
                rank.worker.reqs_need_send["t1"].expire_time = 0.0
                assert await rank.worker.fetch_finished_sending_reqs() == {"p1"}
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1), 5)
            assert world.invalid() == set(D_BLOCKS)
            assert world.untouched([])
            assert not world.prefill[0].worker.finished_sending_reqs

    asyncio.run(run())
    assert "its blocks were freed, because nobody fetched them" in kv_lines.text


def test_a_prefill_that_was_restarted_behind_the_same_port_is_noticed(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=0) as world:
            for receiver in world.receivers:
                receiver.repeat = 0.05
            await world.pull(1, D_BLOCKS)
            await asyncio.sleep(0.3)
            old = getattr(world.prefill[0].worker, kv_vllm.SENDER)
            new = kv_vllm_send.Sender(
                old.worker, old.side, "model", timeout=10, new_request=old.new_request, views=[]
            )
            setattr(old.worker, kv_vllm.SENDER, new)
            await wait_until(lambda: world.pulled(1), 5)
            assert world.invalid() == set(D_BLOCKS)

    asyncio.run(run())
    assert "the prefill server was restarted meanwhile" in kv_lines.text

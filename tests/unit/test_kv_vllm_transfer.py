"""Transfers between ranks in one process: bytes, faults, and peers without the shim."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from types import SimpleNamespace

import kv_ranks
import pytest
import torch
from kv_ranks import D_BLOCKS, P_BLOCKS, RATIOS, World, wait_until

from ascend_patch.impl import kv_vllm, kv_vllm_push, kv_vllm_receive


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sizes", RATIOS, ids=str)
def test_decode_holds_what_it_would_have_computed(kv_host, sizes, layout, heads) -> None:
    async def run() -> None:
        async with World(kv_host, *sizes, heads=heads, layout=layout) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)
            assert world.untouched(D_BLOCKS)
            assert not world.invalid()
            assert not any(rank.worker.reqs_need_send for rank in world.prefill)

    asyncio.run(run())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (6, 2), (1, 3)], ids=str)
def test_sizes_need_not_divide_each_other(kv_host, sizes, layout) -> None:
    async def run() -> None:
        async with World(kv_host, *sizes, heads=6, layout=layout) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)
            assert world.untouched(D_BLOCKS)

    asyncio.run(run())


@pytest.mark.parametrize("room", [None, 256])
def test_heads_taken_token_by_token_are_packed_first(kv_host, room, monkeypatch) -> None:
    if room:
        # Several rounds: a block of two heads is 4 * 2 * 8 * 4 bytes.
        monkeypatch.setattr(kv_vllm_push, "STAGING_BYTES", room)

    async def run() -> None:
        async with World(kv_host, 1, 2, layout="NHD") as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)
            assert world.untouched(D_BLOCKS)
            # One for each block of each region and decode rank, not one for each token.
            assert world.prefill[0].engine.ranges <= 2 * 2 * kv_ranks.LAYERS * len(P_BLOCKS)

    asyncio.run(run())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_blocks_are_freed_after_the_last_decode_rank_and_not_before(kv_host, layout) -> None:
    async def run() -> None:
        async with World(kv_host, 1, 2, layout=layout) as world:
            await world.prefilled(1, P_BLOCKS)
            for number, receiver in enumerate(world.receivers):
                assert not world.freed(1)
                meta = world.meta(1, D_BLOCKS)
                await receiver.start({kv_ranks.PREFILL: {"d1": meta}})
                done = world.decode[number].worker.finished_recving_reqs
                await wait_until(lambda done=done: "d1" in done)
            await wait_until(lambda: world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


def test_heads_that_change_places_are_noticed(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            for rank in world.prefill:
                rank.cache.copy_(rank.cache.roll(1, dims=3))
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            assert not world.right(1, D_BLOCKS)

    asyncio.run(run())


def test_decode_may_ask_before_prefill_has_computed(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.pull(1, D_BLOCKS)
            await asyncio.sleep(0.3)
            assert not world.pulled(1)
            await world.prefilled(1, P_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


def test_a_cached_beginning_and_blocks_behind_the_prompt_are_left_alone(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.prefilled(1, [1, 2, 5, 6])
            # A prompt of 11 tokens in blocks of 4; decode has the first, and a block to spare.
            await world.pull(1, [7, 3, 4], ascend_patch_tokens=11, ascend_patch_cached=1)
            await wait_until(lambda: world.pulled(1))
            found = kv_ranks.truth(4, 1, 4)[:, :, 1:3]
            assert torch.equal(world.decode[0].blocks([7, 3]), found)
            assert world.untouched([7, 3])

    asyncio.run(run())


def test_a_full_local_hit_frees_prefill_and_reports_nothing(kv_host, kv_lines) -> None:
    kv_lines.set_level(logging.DEBUG, logger="vllm")

    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, [])
            # Prefill frees them before decode has heard of it.
            await wait_until(lambda: world.freed(1) and not world.receivers[0]._tasks)
            assert not world.decode[0].worker.finished_recving_reqs
            assert world.untouched([])

    asyncio.run(run())
    assert "prefill TP 2 -> decode TP 1, decode rank 0, from prefill server" in kv_lines.text
    assert "finished; it needed no blocks" in kv_lines.text


def test_a_rank_that_waits_and_computes_nothing_leaves_its_core(kv_host, monkeypatch) -> None:
    forward = importlib.import_module("vllm.forward_context")
    rests: list[float] = []
    nothing, model = (SimpleNamespace(attn_metadata=found) for found in (None, {"layer": 1}))

    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            connector = SimpleNamespace(connector_worker=world.decode[0].worker)
            setattr(connector.connector_worker, kv_vllm.RECEIVER, world.receivers[0])
            step = lambda: kv_vllm.load_errors(lambda: {1}, connector, (), {})  # noqa: E731
            # Only in the calls, not in what the loop does meanwhile.
            sleeps = SimpleNamespace(**vars(time) | {"sleep": rests.append})
            monkeypatch.setattr(kv_vllm_receive, "time", sleeps)
            with forward.override_forward_context(nothing):
                assert step() == {1}
                assert not rests
                await world.pull(1, D_BLOCKS)
                assert step() == {1}
                assert rests == [kv_vllm_receive.REST_S]
            with forward.override_forward_context(model):
                step()
            # A release may end its steps outside.
            step()
            assert len(rests) == 1

    asyncio.run(run())

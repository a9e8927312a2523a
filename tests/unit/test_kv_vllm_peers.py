"""Peers without the shim, of other shapes, or of another model."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import kv_ranks
import pytest
from kv_ranks import World, wait_until

from ascend_patch.impl import (
    kv_vllm,
    kv_vllm_pull,
    kv_vllm_talk,
)

P_BLOCKS, D_BLOCKS = [1, 2, 5], [7, 3, 4]
RATIOS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(kv_vllm_pull, "BACKOFF_S", 0.05)
    monkeypatch.setattr(kv_vllm_talk, "SETTLE_S", 0.05)
    return kv_ranks.connector(monkeypatch)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    # vLLM's logger hands nothing on, and its level is what the environment said at import.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm")
    return caplog


def invalid(world: World) -> set[int]:
    return set().union(*(one.take_invalid() for one in world.receivers))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=str)
def test_an_unpatched_prefill_is_not_asked_to_push_what_it_would_get_wrong(
    host, sizes, lines
) -> None:
    async def run() -> None:
        async with World(host, *sizes, patched=(False, True), retries=0) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            assert invalid(world) == set(D_BLOCKS)
            assert world.untouched([])

    asyncio.run(run())
    assert "needs ascend-patch on both sides, and the prefill server answers without" in lines.text


def test_an_unpatched_prefill_of_equal_size_pushes_as_before(host) -> None:
    async def run() -> None:
        async with World(host, 2, 2, patched=(False, True)) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


def test_blocks_are_kept_while_an_unpatched_prefill_may_push_unasked(host) -> None:
    async def run() -> None:
        async with World(host, 2, 2, patched=(False, True), timeout=0.5) as world:
            await world.pull(1, D_BLOCKS)
            found: set[int] = set()
            await wait_until(lambda: bool(found.update(invalid(world)) or found))
            await asyncio.sleep(1)
            assert not world.pulled(1)
            await world.prefilled(1, P_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))

    asyncio.run(run())


def test_an_unpatched_decode_of_equal_size_pulls_as_before(host) -> None:
    async def run() -> None:
        async with World(host, 2, 2) as world:
            await world.prefilled(1, P_BLOCKS)
            await ask_unpatched(world)
            assert world.pulled(1)
            assert world.freed(1)
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


async def ask_unpatched(world: World) -> None:
    """vLLM's own decode side."""
    for rank in world.decode:
        pulls = {"d1": world.meta(1, D_BLOCKS)}
        pulls["d1"].pull_tasks_count = 1
        address = world.addresses[rank.number]
        await rank.worker.receive_kv_from_single_worker(address, pulls)


def test_an_unpatched_decode_of_another_size_is_told_why(host, lines) -> None:
    async def run() -> None:
        async with World(host, 2, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            await ask_unpatched(world)
            assert not world.pulled(1)
            assert world.untouched([])

    asyncio.run(run())
    assert "needs ascend-patch on both sides, and the decode server answers without" in lines.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "bfloat16", "itemsize": 2}, "dtype of the cache: prefill has bfloat16"),
        ({"block_size": 6}, "block size: prefill has 6, decode 4"),
        ({"storage": "NZ"}, "storage of the cache: prefill has NZ, decode plain"),
        ({"layout": "HND"}, ""),
    ],
    ids=str,
)
def test_what_the_sides_say_is_compared_before_anything_is_written(
    host, changes, sentence, lines
) -> None:
    async def run() -> None:
        async with World(host, 2, 1, retries=0) as world:
            kv_ranks.with_side(world, **changes)
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            if sentence:
                assert invalid(world) == set(D_BLOCKS)
                assert world.untouched([])
            else:
                assert not invalid(world)

    asyncio.run(run())
    assert sentence in lines.text


def test_another_model_of_the_same_shape_is_pointed_out_once(host, lines) -> None:
    async def run() -> None:
        async with World(host, 2, 1) as world:
            for rank in world.prefill:
                getattr(rank.worker, kv_vllm.SENDER).said["model"] = "/elsewhere/other"
            for number in range(2):
                await world.prefilled(number, P_BLOCKS)
                await world.pull(number, D_BLOCKS)
                await wait_until(lambda n=number: world.pulled(n))

    asyncio.run(run())
    assert lines.text.count("serves other and this one model") == 1


def test_hnd_prefill_fills_nhd_decode(host) -> None:
    async def run() -> None:
        async with World(host, 2, 1, layout="NHD", prefill_layout="HND") as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())

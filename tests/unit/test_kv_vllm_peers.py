"""Peers without the shim, of other shapes, or of another model."""

from __future__ import annotations

import asyncio

import kv_ranks
import pytest
from kv_ranks import D_BLOCKS, P_BLOCKS, World, wait_until

from ascend_patch.impl import (
    kv_vllm,
)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=str)
def test_an_unpatched_prefill_is_not_asked_to_push_what_it_would_get_wrong(
    kv_host, sizes, kv_lines
) -> None:
    async def run() -> None:
        async with World(kv_host, *sizes, patched=(False, True), retries=0) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            assert world.invalid() == set(D_BLOCKS)
            assert world.untouched([])

    asyncio.run(run())
    assert (
        "needs ascend-patch on both sides, and the prefill server answers without" in kv_lines.text
    )


def test_an_unpatched_prefill_of_equal_size_pushes_as_before(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 2, patched=(False, True)) as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())


def test_blocks_are_kept_while_an_unpatched_prefill_may_push_unasked(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 2, patched=(False, True), timeout=0.5) as world:
            await world.pull(1, D_BLOCKS)
            found: set[int] = set()
            await wait_until(lambda: bool(found.update(world.invalid()) or found))
            await asyncio.sleep(1)
            assert not world.pulled(1)
            await world.prefilled(1, P_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))

    asyncio.run(run())


def test_an_unpatched_decode_of_equal_size_pulls_as_before(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 2) as world:
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


def test_an_unpatched_decode_of_another_size_is_told_why(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            await world.prefilled(1, P_BLOCKS)
            await ask_unpatched(world)
            assert not world.pulled(1)
            assert world.untouched([])

    asyncio.run(run())
    assert (
        "needs ascend-patch on both sides, and the decode server answers without" in kv_lines.text
    )


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
    kv_host, changes, sentence, kv_lines
) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=0) as world:
            kv_ranks.with_side(world, **changes)
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1))
            if sentence:
                assert world.invalid() == set(D_BLOCKS)
                assert world.untouched([])
            else:
                assert not world.invalid()

    asyncio.run(run())
    assert sentence in kv_lines.text


def test_another_model_of_the_same_shape_is_pointed_out_once(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1) as world:
            for rank in world.prefill:
                getattr(rank.worker, kv_vllm.SENDER).said["model"] = "/elsewhere/other"
            for number in range(2):
                await world.prefilled(number, P_BLOCKS)
                await world.pull(number, D_BLOCKS)
                await wait_until(lambda n=number: world.pulled(n))

    asyncio.run(run())
    assert kv_lines.text.count("serves other and this one model") == 1


def test_hnd_prefill_fills_nhd_decode(kv_host) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, layout="NHD", prefill_layout="HND") as world:
            await world.prefilled(1, P_BLOCKS)
            await world.pull(1, D_BLOCKS)
            await wait_until(lambda: world.pulled(1) and world.freed(1))
            assert world.right(1, D_BLOCKS)

    asyncio.run(run())

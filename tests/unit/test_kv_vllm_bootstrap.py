"""Bootstrap servers that know no such prefill server, or give no answer."""

from __future__ import annotations

import asyncio
from typing import Any

from kv_ranks import D_BLOCKS, World, wait_until


def test_an_engine_that_the_bootstrap_server_does_not_know_is_a_sentence(kv_host, kv_lines) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, retries=1) as world:
            meta = world.meta(1, D_BLOCKS)
            meta.remote_engine_id = "before-the-restart"
            await world.receivers[0].start({"before-the-restart": {"d1": meta}})
            await wait_until(lambda: world.pulled(1), 5)
            assert world.invalid() == set(D_BLOCKS)

    asyncio.run(run())
    assert "knows no prefill server before-the-restart" in kv_lines.text


def test_a_bootstrap_server_that_hangs_is_asked_once_and_given_up_in_time(
    kv_host, kv_lines
) -> None:
    async def run() -> None:
        async with World(kv_host, 2, 1, timeout=0.6) as world:
            asked: list[str] = []

            async def hang(address: str) -> Any:
                asked.append(address)
                await asyncio.sleep(60)

            world.receivers[0]._query = hang  # type: ignore[method-assign]
            for number in range(20):
                await world.pull(number, [number % 9])
            await wait_until(lambda: all(world.pulled(n) for n in range(20)), 5)
            assert asked == ["http://none"]
            assert world.invalid() == set(range(9))

    asyncio.run(run())
    assert "its bootstrap server gave no answer in time" in kv_lines.text

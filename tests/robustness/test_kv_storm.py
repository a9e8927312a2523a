"""One stalled write and 5,000 newer attempts: no byte lands in a block of another owner.

On vLLM's own worker class and the shim's Sender and Receiver, on a virtual clock, with as many
records as in production. Each block has an owner, and each byte that lands is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tally import tally

pytest_plugins = ("kv_lab",)

NEWER = 5_000
# Longer than any pull, than a prefill rank keeps blocks, and than keepalive waits.
LONG_S = 150.0


@pytest.fixture
def new_world(kv_lab, monkeypatch) -> Iterator[Any]:
    """Makes worlds in which a prefill rank remembers as much as in production."""
    from kv_simulation import SimWorld

    from ascend_patch.impl import kv_vllm_send

    monkeypatch.setattr(kv_vllm_send, "REMEMBERED", 4096)
    made: list[Any] = []

    def make(*sizes: int, **setup: Any) -> Any:
        made.append(SimWorld(kv_lab, *sizes, **setup))
        return made[-1]

    yield make
    for world in made:
        world.end()


def stall(world: Any, *, ranks: int = 1) -> Any:
    """A request whose pushes stop half-way on so many prefill ranks."""
    from kv_simulation import Fortune

    for rank in world.prefill[:ranks]:
        rank.engine.threads.fortunes.append(Fortune(stalls=True))
    one = world.request(3, 0.0, 0.0)
    assert world.loop.until(lambda: sum(w.landed > 0 for w in world.writes) == ranks, 5)
    return one


def storm(world: Any, *, rank: int = 0, live: bool = False) -> None:
    """5,000 newer attempts at a prefill rank: all waiting, or each given up again."""
    for _ in range(NEWER // 100):
        world.flood(world.addresses_of()[rank], 100, *(("ask",) if live else ("ask", "cancel")))


def others(world: Any) -> list[Any]:
    """Requests that take every block that is free; they are loaded, and their blocks stay."""
    found = []
    while min(len(world.free(o)) for o in (world.decode_owner, world.prefill_owner)):
        found.append(world.request(1, 0.0, 0.0))
    return found


def finish(world: Any, one: Any, what: str) -> None:
    """Let the stalled writes end among other owners' blocks, and see whose bytes are where."""
    for _ in range(4):
        others(world)
        world.loop.pass_time(8)
    for write in world.writes:
        write.end()
    world.loop.pass_time(LONG_S)
    assert not world.violations, world.violations
    assert one.ended in ("loaded", "failed")
    # Where another process took the writer's address nothing tells that the writer has ended.
    assert one.back or one.doubtful, "the write has ended, and the blocks are still held"
    # The control: newer requests are served.
    if world.free(world.decode_owner):
        world.request(1, 0.0, 0.0)
        world.loop.pass_time(5)
    loaded = sum(other.ended == "loaded" for other in world.requests.values())
    assert loaded >= 1
    tally(f"KV storm: {what}", tried=NEWER, unit="attempts", note=f"{loaded} others loaded")


@pytest.mark.fault("write_in_flight_is_forgotten")
@pytest.mark.parametrize("live", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_write_in_flight_survives_five_thousand_newer_attempts(new_world, live) -> None:
    world = new_world(1, 1)
    one = stall(world)
    storm(world, live=live)
    # Asked about its write, prefill must not deny it.
    world.loop.pass_time(6)
    assert not one.back, "the blocks were given back while prefill writes to them"
    finish(world, one, f"one stalled write, newer ones {'live' if live else 'over'}")
    assert one.ended == "loaded" or one.failed


@pytest.mark.fault("write_in_flight_is_forgotten")
@pytest.mark.parametrize("retries", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_retries_are_used_up_while_a_write_is_in_flight(new_world, retries) -> None:
    world = new_world(2, 1, retries=retries)
    from kv_simulation import Fortune

    # The other rank fails each attempt, so that the pull fails as a whole.
    world.prefill[1].engine.threads.fortunes.extend(Fortune(code=-1) for _ in range(9))
    one = stall(world)
    storm(world)
    assert world.loop.until(lambda: one.ended == "failed", 40)
    assert not one.back, "the blocks were given back while prefill writes to them"
    finish(world, one, f"one stalled write, {retries} retries used up")


@pytest.mark.fault("write_in_flight_is_forgotten")
def test_two_ranks_stall(new_world) -> None:
    world = new_world(2, 1)
    one = stall(world, ranks=2)
    for rank in range(2):
        storm(world, rank=rank)
    world.loop.pass_time(6)
    assert not one.back, "the blocks were given back while prefill writes to them"
    # One of the two ends long before the other.
    world.writes[0].end()
    world.loop.pass_time(30)
    assert not one.back, "the blocks were given back while the second rank writes to them"
    finish(world, one, "two stalled ranks")


@pytest.mark.fault("blocks_given_back_too_early")
def test_a_partition_comes_in_between(new_world) -> None:
    world = new_world(1, 1)
    one = stall(world)
    (address,) = world.addresses_of()
    world.network.cut.add(address)
    # Keepalive ends the connection; the write goes on, on a connection of the engine's own.
    world.loop.pass_time(60)
    assert one.ended == "failed"
    assert not one.back, "the blocks were given back while prefill writes to them"
    world.network.heal(address)
    storm(world)
    world.loop.pass_time(6)
    assert not one.back, "the blocks were given back while prefill writes to them"
    finish(world, one, "a partition in between")


@pytest.mark.parametrize("same_ports", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_restart_comes_in_between(new_world, same_ports) -> None:
    world = new_world(1, 1)
    one = stall(world)
    storm(world)
    world.restart(same_ports=same_ports)
    world.loop.pass_time(1)
    storm(world)
    world.loop.pass_time(40)
    assert one.ended == "failed"
    finish(world, one, f"a restart in between, {'same' if same_ports else 'other'} ports")

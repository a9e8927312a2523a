"""Implementations that are wrong in one decision each: the oracle of the state machine sees it.

Each scenario is a short run of the world that `test_kv_state_machine.py` walks through at random.
It passes with the implementation as it is, and fails with the mutant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tally import tally

pytest_plugins = ("kv_lab",)

World = Any


@pytest.fixture
def new_world(kv_lab) -> Iterator[Callable[..., World]]:
    from kv_simulation import SimWorld

    made: list[World] = []

    def make(*sizes: int, **setup: Any) -> World:
        made.append(SimWorld(kv_lab, *sizes, **setup))
        return made[-1]

    yield make
    for world in made:
        world.end()


def stall(world: World, size: int = 2) -> Any:
    """A request whose push stops half-way."""
    from kv_simulation import Fortune

    before = len(world.writes)
    world.prefill[0].engine.threads.fortunes.append(Fortune(stalls=True))
    one = world.request(size, 0.0, 0.0)
    assert world.loop.until(lambda: len(world.writes) > before, 5)
    world.loop.pass_time(0.1)
    return one


def finish(world: World) -> None:
    """Others take what is free, the stalled writes end, and each byte is where it belongs."""
    for _ in range(3):
        while min(len(world.free(o)) for o in (world.decode_owner, world.prefill_owner)):
            world.request(1, 0.0, 0.0)
        world.loop.pass_time(3)
    for write in world.writes:
        write.end()
    world.loop.pass_time(90)
    assert not world.violations, world.violations


def newer_attempts(world: World) -> None:
    stall(world)
    for _ in range(4):
        world.flood(world.addresses_of()[0], 10, "ask", "cancel")
    world.loop.pass_time(6)
    finish(world)


def other_nonce(world: World) -> None:
    _answers(world, "another nonce, failed")


def undecodable(world: World) -> None:
    _answers(world, "garbage 2")


def lost_field(world: World) -> None:
    _answers(world, "error without the field")


def _answers(world: World, name: str) -> None:
    from kv_changes import ANSWERS
    from kv_channel import Fate

    stall(world)
    (wire,) = (d.wire for d in world.network.dealers if d.wire is not None)
    # What prefill said last comes again, changed, as from somebody who has its connection.
    for _ in range(3):
        world.network.fates["answer"].append(Fate(change=ANSWERS[name]))
        wire.post("answer", wire.last)
    world.loop.pass_time(6)
    finish(world)


def partition(world: World) -> None:
    stall(world)
    (address,) = world.addresses_of()
    world.network.cut.add(address)
    world.loop.pass_time(60)
    world.network.heal(address)
    world.loop.pass_time(1)
    finish(world)


def cap(world: World) -> None:
    """Blocks are kept for writers that stopped, until no more may be; then a pull is refused."""
    from kv_simulation import QUARANTINE

    limit, held = int(QUARANTINE * 9), 0
    while held < limit:
        one = stall(world)
        held += len(one.decode_blocks)
    world.loop.pass_time(30)
    kept = sum(len(r.decode_blocks) for r in world.requests.values() if r.ended and not r.back)
    assert kept >= limit
    late = world.request(1, 0.0, 0.0)
    world.loop.pass_time(2)
    assert late.ended == "failed", "a pull began although the cap of kept blocks was reached"
    assert late.back
    finish(world)


def evict_any(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_records, kv_vllm_send

    begin = kv_vllm_records.Records.begin

    def evicting(self: Any, *args: Any) -> Any:
        job = begin(self, *args)
        while len(self.jobs) > kv_vllm_send.REMEMBERED:
            self.jobs.pop(next(iter(self.jobs)))
        return job

    monkeypatch.setattr(kv_vllm_records.Records, "begin", evicting)


def end_at_other_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_talk

    hear = kv_vllm_talk.Conversation._hear

    def hearing(self: Any, answer: Any) -> str:
        ours = answer.ascend_patch or {}
        if self.told is not None and ours.get("nonce") != self.told.get("nonce"):
            self.doubtful = False
        return hear(self, answer)

    monkeypatch.setattr(kv_vllm_talk.Conversation, "_hear", hearing)


def end_at_undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_link, kv_vllm_wire

    last: dict[str, Any] = {}

    def decode(data: bytes) -> Any:
        try:
            found = real(data)
        except kv_vllm_wire.MessageError:
            return kv_vllm_wire.Answer(0, err_msg="no", ascend_patch=last | {"state": "failed"})
        last.update(found.ascend_patch or {})
        return found

    real = kv_vllm_wire.decode_answer
    monkeypatch.setattr(kv_vllm_wire, "decode_answer", decode)
    monkeypatch.setattr(kv_vllm_link.kv_vllm_wire, "decode_answer", decode)


def end_at_lost_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_talk

    hear = kv_vllm_talk.Conversation._hear

    def hearing(self: Any, answer: Any) -> str:
        if answer.ascend_patch is None:
            self.doubtful = False
            raise kv_vllm_talk.PullError("the prefill server reports an error")
        return hear(self, answer)

    monkeypatch.setattr(kv_vllm_talk.Conversation, "_hear", hearing)


def end_at_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_quarantine

    async def ended(*_: Any) -> bool:
        return True

    monkeypatch.setattr(kv_vllm_quarantine, "has_ended", ended)


def no_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_patch.impl import kv_vllm_quarantine

    monkeypatch.setattr(kv_vllm_quarantine.Quarantine, "refusal", lambda _: "")


MUTANTS = {
    "jobs are evicted whatever their state": (newer_attempts, evict_any),
    "blocks go back at another nonce": (other_nonce, end_at_other_nonce),
    "an answer that cannot be read is a failure": (undecodable, end_at_undecodable),
    "an error without the field is believed": (lost_field, end_at_lost_field),
    "blocks go back when the connection is lost": (partition, end_at_lost_connection),
    "the cap is ignored": (cap, no_cap),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_scenario_passes_and_its_mutant_fails(new_world, monkeypatch, name) -> None:
    scenario, mutate = MUTANTS[name]
    scenario(new_world(1, 1, retries=0))
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"given back|cap of kept"):
        scenario(new_world(1, 1, retries=0))
    tally("KV mutants: vLLM's connector", tried=1, unit="mutants", note=name)

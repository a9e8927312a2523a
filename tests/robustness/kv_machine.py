"""A state machine of a prefill and a decode server: steps that anything may take at any time."""

from __future__ import annotations

import collections
from typing import Any, ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_changes import ANSWERS, ASKS, Change, flip
from kv_channel import Fate
from kv_simulation import EXPIRE_S, GRACE_S, PULL_S, Fortune, Request, SimWorld

# What a world gets to become quiet, in virtual seconds: a pull, and what a prefill rank keeps.
QUIET_S = PULL_S + GRACE_S + EXPIRE_S + 30
DELAYS = (0.0, 0.05, 1.0, 4.0, 15.0, 45.0)
# Of a rank: connections that may be open at once for each request that is not over.
SOCKETS_EACH = 12


def _late(name: str) -> bool:
    return not name.startswith(("garbage", "cut", "several", "error without"))


def fates(changes: dict[str, Change]) -> st.SearchStrategy[Fate]:
    """What becomes of a message: mostly nothing; else it is lost, doubled, late, or another one."""
    quiet = st.just(Fate())
    copies = st.lists(st.sampled_from(DELAYS), max_size=3).map(lambda one: Fate(tuple(one)))
    changed = st.builds(
        lambda name, twice: Fate((0.0, 0.5) if twice else (0.0,), changes[name], _late(name)),
        st.sampled_from(sorted(changes)),
        st.booleans(),
    )
    flipped = st.integers(0, 8 * 400).map(lambda place: Fate((0.0,), flip(place), True))
    both = [quiet, quiet, copies, changed]
    return st.one_of(*both, flipped) if changes is ANSWERS else st.one_of(*both)


answers, asks = fates(ANSWERS), fates(ASKS)
fortunes = st.builds(
    Fortune,
    seconds=st.sampled_from((0.01, 1.0, 8.0, 40.0)),
    code=st.sampled_from((0, 0, 0, -1)),
    stalls=st.booleans(),
)


class Machine(RuleBasedStateMachine):
    """Its `lab` is set by the test that runs it; `counts` is of all runs."""

    lab: ClassVar[Any]
    counts: ClassVar[collections.Counter[str]] = collections.Counter()

    world: SimWorld

    @initialize(
        sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)), retries=st.sampled_from((0, 2, 5))
    )
    def start(self, sizes: tuple[int, int], retries: int) -> None:
        self.world = SimWorld(self.lab, *sizes, retries=retries)
        # An equal pair that never spoke may have a peer without the shim, which writes unasked.
        self.world.request(1, 0.0, 0.0)
        self.world.loop.pass_time(1)
        self.restarted: list[int] = []

    def _count(self, what: str) -> None:
        type(self).counts["steps"] += 1
        type(self).counts[what] += 1

    # Requests.

    @rule(
        size=st.integers(1, 3),
        prefill_after=st.sampled_from((0.0, 0.0, 0.5, 5.0, 30.0, None)),
        pull_after=st.sampled_from((0.0, 0.0, 0.3, 8.0)),
    )
    def request(self, size: int, prefill_after: float | None, pull_after: float) -> None:
        world = self.world
        self._count("request")
        if min(self._room()) >= size:
            world.request(size, prefill_after, pull_after)
            world.loop.pass_time(0.002)

    def _room(self) -> tuple[int, int]:
        world = self.world
        return len(world.free(world.decode_owner)), len(world.free(world.prefill_owner))

    @precondition(lambda self: any(not one.prefilled for one in self.world.requests.values()))
    @rule()
    def abort(self) -> None:
        self._count("abort")
        waiting = [one for one in self.world.requests.values() if not one.prefilled]
        self.world.abort_prefill(waiting[-1])
        self.world.loop.pass_time(0.002)

    @rule(fortune=fortunes, size=st.integers(1, 3))
    def request_with_trouble(self, fortune: Fortune, size: int) -> None:
        self._count("request with a slow, stalled or failed write")
        if min(self._room()) >= size:
            for rank in self.world.prefill:
                rank.engine.threads.fortunes.append(fortune)
            self.world.request(size, 0.0, 0.0)
            self.world.loop.pass_time(0.05)

    @rule(seconds=st.sampled_from((0.002, 0.02, 0.3, 1.0)))
    def pass_little_time(self, seconds: float) -> None:
        self._count("little time passes")
        self.world.loop.pass_time(seconds)

    @rule(seconds=st.sampled_from((2.5, 11.0, 30.0)))
    def pass_time(self, seconds: float) -> None:
        self._count("time passes")
        self.world.loop.pass_time(seconds)

    # The channel.

    @rule(given=st.lists(answers, min_size=1, max_size=4))
    def change_answers(self, given: list[Fate]) -> None:
        self._count("lose, double, delay, change answers")
        self.world.network.fates["answer"].extend(given)

    @rule(given=st.lists(asks, min_size=1, max_size=4))
    def change_asks(self, given: list[Fate]) -> None:
        self._count("lose, double, delay, change messages to prefill")
        self.world.network.fates["ask"].extend(given)

    @rule(rank=st.integers(0, 2))
    def cut(self, rank: int) -> None:
        self._count("partition")
        addresses = self.world.addresses_of()
        self.world.network.cut.add(addresses[rank % len(addresses)])

    @precondition(lambda self: self.world.network.cut)
    @rule()
    def heal(self) -> None:
        self._count("heal")
        for address in sorted(self.world.network.cut):
            self.world.network.heal(address)
        self.world.loop.pass_time(0.01)

    # The engines and processes.

    @rule(rank=st.integers(0, 2), fortune=fortunes)
    def trouble(self, rank: int, fortune: Fortune) -> None:
        self._count("slow, stalled or failed write")
        ranks = self.world.prefill
        ranks[rank % len(ranks)].engine.threads.fortunes.append(fortune)

    @precondition(lambda self: self.world.writes)
    @rule(which=st.integers(0, 5))
    def release(self, which: int) -> None:
        self._count("release a write")
        writes = self.world.writes
        writes[which % len(writes)].end()
        self.world.loop.pass_time(0.01)

    @rule(same_ports=st.booleans())
    def restart(self, same_ports: bool) -> None:
        self._count("restart")
        if len(self.restarted) < 2:
            self.restarted.append(self.world.count)
            self.world.restart(same_ports=same_ports)

    # Another decode server, hostile or merely busy.

    @precondition(lambda self: self.world.template is not None)
    @rule(rank=st.integers(0, 2), count=st.integers(1, 24), kind=st.sampled_from(("ask", "cancel")))
    def flood(self, rank: int, count: int, kind: str) -> None:
        self._count("exhaust records")
        addresses = self.world.addresses_of()
        self.world.flood(addresses[rank % len(addresses)], count, kind)

    # What must hold.

    @invariant()
    def nothing_wrong(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return
        assert not world.violations, world.violations
        assert not world.loop.complaints, world.loop.complaints
        if self.lab.lines.tracebacks:
            found = self.lab.lines.tracebacks[0]
            self.lab.lines.tracebacks.clear()
            raise AssertionError(f"an internal error: {found}")
        waiting = sum(not one.back for one in world.requests.values())
        most = SOCKETS_EACH * (waiting + 1) * len(world.decode) * len(world.prefill)
        found = world.network.open_sockets(world.decode_process)
        assert found <= most, f"{found} sockets for {waiting} requests"
        tasks = len(world.decode_process.tasks)
        assert tasks <= 6 * most, f"{tasks} tasks for {waiting} requests"

    def teardown(self) -> None:
        world = getattr(self, "world", None)
        if world is None:
            return
        try:
            self._settle(world)
        finally:
            for one in world.requests.values():
                type(self).counts[one.ended or "without a pull"] += 1
            world.end()

    def _settle(self, world: SimWorld) -> None:
        """When the network is whole and each write has ended, everything is given back."""
        for waiting in world.network.fates.values():
            waiting.clear()
        for address in list(world.network.cut):
            world.network.heal(address)
        for dealer in world.floods:
            dealer.close(0)

        def quiet() -> bool:
            for rank in world.prefill:
                rank.engine.threads.fortunes.clear()
            for write in world.writes:
                write.end()
            return all(map(self._is_over, world.requests.values()))

        # No delayed message is older than the longest delay.
        world.loop.until(quiet, 2 * QUIET_S, step=1.0)
        self.nothing_wrong()
        left = [one for one in world.requests.values() if not self._is_over(one)]
        for one in left:
            note(f"not over: {one}")
        assert not left, f"blocks are still held by requests {[one.number for one in left]}"
        world.loop.pass_time(5)
        if any(not one.back for one in world.requests.values()):
            return
        found = world.network.open_sockets(world.decode_process)
        assert not found, f"{found} sockets are open, and nothing is under way"
        tasks = [task for task in world.decode_process.tasks if not task.done()]
        assert len(tasks) <= 2, f"tasks go on, and nothing is under way: {tasks}"

    def _is_over(self, one: Request) -> bool:
        freed = one.freed or not one.prefill_blocks
        return (one.back or one.doubtful) and freed

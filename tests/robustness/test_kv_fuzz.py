"""50,000 messages that no peer should send, to both sides of vLLM's connector.

Each ends with a sentence or is ignored, within some milliseconds; nothing is written where the
message does not say, no traceback is logged, memory stays as it was, and then a well-formed request
is served. Sockets and time are simulated (`kv_channel`, `kv_clock`); the listener and what reads
the messages are real.
"""

from __future__ import annotations

import copy
import gc
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kv_changes import FIELD, GARBAGE, HUGE, anything, wild
from tally import tally

pytest_plugins = ("kv_lab",)

EACH_SIDE = 25_000
# CPU seconds that one message may cost: the best of three tries, so that a pause is not counted.
MOST_S, LONGEST_S = 0.02, 5.0
MOST_BYTES = 16 << 20
# Answers to one pull; then another one begins.
TO_ONE_PULL = 25
SIZES = (8_000, 40_000, 3 * 10**7, 2**31, 2**63, 2**64 - 1, 10**30)
# What tells that an exception of the code itself was sent to a peer.
INTERNAL = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Iteration)\b|NoneType|has no attribute|subscriptable|unpack|"
    r"unhashable|not iterable|Traceback|object is not|positional argument"
)
encode = msgspec.msgpack.Encoder().encode


@pytest.fixture
def new_world(kv_lab, monkeypatch) -> Iterator[Any]:
    from kv_simulation import SimWorld

    from ascend_patch.impl import kv_vllm_send

    monkeypatch.setattr(kv_vllm_send, "REMEMBERED", 256)
    monkeypatch.setattr(Overtime, "seen", False)
    before = signal.signal(signal.SIGVTALRM, stop)
    made: list[Any] = []

    def make(*sizes: int, **setup: Any) -> Any:
        made.append(SimWorld(kv_lab, *sizes, **setup))
        return made[-1]

    yield make
    signal.signal(signal.SIGVTALRM, before)
    for world in made:
        world.end()


class Memory:
    """The most memory that the process had while this was open."""

    def __enter__(self) -> Memory:
        gc.collect()
        gc.freeze()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")
        return self

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) << 10

    @property
    def growth(self) -> int:
        """Bytes, at the highest."""
        return self._read("VmHWM") - self.before

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a message are."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(len(value)):
            yield from leaves(value[place], (*path, place))


def replaced(message: Any, path: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(message)
    here = found
    for step in path[:-1]:
        here = here[step]
    if value is ...:
        if isinstance(here, dict):
            del here[path[-1]]
        else:
            here.pop(path[-1])
    else:
        here[path[-1]] = value
    return found


def written(message: Any) -> bytes | None:
    """As msgpack; what is larger than 64 bits is no msgpack, and is sent as an ext type."""
    try:
        return encode(message)
    except (OverflowError, msgspec.MsgspecError, RecursionError, UnicodeEncodeError):
        return None


def systematic(message: dict[str, Any]) -> Iterator[bytes]:
    """Sizes that make a plan costly, and each value replaced by each odd one."""
    for name in ("tp", "pp", "block_size", "context_parallel", "kv_cache_groups", "itemsize"):
        for size in SIZES:
            if name in message.get(FIELD, {}).get("side", {}):
                yield written(replaced(message, (FIELD, "side", name), size)) or b""
    for path in list(leaves(message)):
        for value in (..., *HUGE, *SIZES, "\x1b[31m" * 200, [[]] * 500, b"\xff"):
            yield written(replaced(message, path, value)) or b""


def messages(chooser: random.Random, known: list[dict[str, Any]], count: int) -> Iterator[bytes]:
    """First all that is systematic, then at random, until there are so many."""
    first = [one for message in known for one in systematic(message)]
    # What is costly comes first, so that it is found at once; of the rest a part is enough.
    costly, rest = first[:42], first[42:]
    chooser.shuffle(rest)
    yield from costly
    yield from rest[: count // 2]
    for _ in range(count - len(costly) - min(len(rest), count // 2)):
        yield at_random(chooser, known)


def at_random(chooser: random.Random, known: list[dict[str, Any]]) -> bytes:
    kind = chooser.randrange(8)
    message = chooser.choice(known)
    if kind < 4:
        for _ in range(chooser.choice((1, 1, 2, 5))):
            message = wild(chooser, message)
        return written(message) or b"\xc1"
    if kind == 4:
        return written(anything(chooser)) or b"\xc1"
    if kind == 5:
        return chooser.choice((*GARBAGE, chooser.randbytes(chooser.randrange(200))))
    found = bytearray(encode(message))
    if kind == 6:
        return bytes(found[: chooser.randrange(len(found))])
    for _ in range(chooser.choice((1, 3, 20))):
        found[chooser.randrange(len(found))] = chooser.randrange(256)
    return bytes(found)


class Overtime(BaseException):
    """Ends a message that takes too long, wherever it is; `seen` even if that is swallowed."""

    seen = False


def stop(*_: object) -> None:
    Overtime.seen = True
    raise Overtime


def seconds(world: Any, say: Any) -> float:
    """CPU seconds of one message, and of all that it sets off at once.

    Infinity if they are too many to wait for the end.
    """
    began = time.thread_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_S)
    try:
        say()
        world.loop.pass_time(0.003)
    except Overtime:
        return float("inf")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return float("inf") if Overtime.seen else time.thread_time() - began


def check_cost(world: Any, say: Any, content: bytes) -> float:
    best = float("inf")
    for _ in range(3):
        if best <= MOST_S:
            break
        best = min(best, seconds(world, say))
        assert not Overtime.seen, f"a message costs {LONGEST_S:.0f} s and more: {content[:900]!r}"
    assert best <= MOST_S, f"a message costs {best:.3f} s: {content[:900]!r}"
    return best


class Claims:
    """Holds each byte that is written against what the message said."""

    def __init__(self, world: Any) -> None:
        self.world, self.content, self.writes = world, b"", 0
        world.land = self.land

    def land(
        self, write: Any, source: int, target: int, length: int, copied: Any, session: str, _: int
    ) -> None:
        self.writes += 1
        said = msgspec.msgpack.decode(self.content)
        host, port = said[FIELD]["hostname"], said["remote_port"]
        if session.replace("[", "").replace("]", "") != f"{host}:{port}":
            self.world.violation(f"a write goes to {session}, and {host}:{port} was said")
        side = said[FIELD]["side"]
        heads = side["groups"][0]["kv_heads"]
        block = side["block_size"] * max(1, heads // side["tp"]) * side["itemsize"]
        block *= max(side["groups"][0]["widths"])
        ((_, (_, blocks)),) = said["req_blocks"].items()
        for base in said["kv_caches_base_addr"]:
            for one in blocks:
                if base + one * block <= target and target + length <= base + (one + 1) * block:
                    return
        self.world.violation(f"{length} bytes are written to {target:#x}: {self.content[:900]!r}")


@pytest.mark.fault("planning_cost_is_unbounded")
def test_a_listener_survives_what_no_peer_should_send(new_world, kv_lab, seed) -> None:
    from kv_channel import Dealer, Process

    world, chooser = new_world(2, 1), random.Random(seed)
    world.request(2, 0.0, 0.0)
    world.loop.pass_time(3)
    assert world.requests[1].ended == "loaded"
    # A request that has been computed, and that nobody has asked for yet.
    waiting = world.request(2, 0.0, 1e9)
    world.loop.pass_time(1)
    ask = copy.deepcopy(world.template)
    assert ask is not None
    ask["req_blocks"] = {f"d{waiting.number}": [f"t{waiting.number}", waiting.decode_blocks]}
    go, cancel = (
        ask | {FIELD: ask[FIELD] | {"kind": kind, "transfer": "t2", "rank": 0}}
        for kind in ("go", "cancel")
    )
    claims = Claims(world)
    dealer = Dealer(world.network, Process("hostile"))
    dealer.connect(world.addresses_of()[0])
    sentences, slowest, tried, count = set(), 0.0, 0, 0

    def hear(content: bytes) -> None:
        """Read the answers; what asks for leave to write gets it."""
        while dealer._received:
            frame = dealer._received.popleft()[-1]
            answer = msgspec.msgpack.decode(frame)
            sentence = answer.get("err_msg")
            if sentence is not None and sentence not in sentences:
                assert not INTERNAL.search(sentence), f"{sentence!r} to {content[:600]!r}"
                assert len(sentence) < 2000
                sentences.add(sentence)
            ours = answer.get(FIELD) or {}
            if ours.get("state") == "ready" and ours.get("epoch") is not None:
                leave = {"req_blocks": ask["req_blocks"], FIELD: ours | {"kind": "go"}}
                world.loop.run_until_complete(dealer.send(encode(leave)))
                world.loop.pass_time(0.05)

    with Memory() as memory:
        for content in messages(chooser, [ask, go, cancel], EACH_SIDE):
            claims.content = content
            count += 1
            fresh = content.replace(ask[FIELD]["epoch"].encode(), f"{count:034d}".encode())
            say = lambda m=fresh: world.loop.run_until_complete(dealer.send(m))  # noqa: E731
            slowest = max(slowest, check_cost(world, say, content))
            hear(content)
            tried += 1
            assert not world.violations, world.violations
            if kv_lab.lines.tracebacks:
                pytest.fail(f"{kv_lab.lines.tracebacks[0]}\nof {content[:900]!r}")
        assert memory.growth < MOST_BYTES, f"{memory.growth >> 20} MiB more"
        growth = memory.growth
    assert not world.loop.complaints
    dealer.close(0)
    del world.land
    # What is half said may be kept for as long as a job lives.
    world.loop.pass_time(15)
    last = world.request(2, 0.0, 0.0)
    assert world.loop.until(lambda: last.ended == "loaded", 20), "no request is served any more"
    assert not world.violations
    # The control: some of them were whole enough to be written for, and many were refused.
    assert claims.writes
    assert len(sentences) > 20
    note = f"slowest {1e3 * slowest:.1f} ms of CPU, growth {growth / 2**20:.1f} MiB"
    what = "KV wire: messages to a prefill rank of vLLM's connector"
    tally(what, tried=tried, unit="messages", seed=seed, note=f"{note}, {len(sentences)} sentences")


def forged(content: bytes, epoch: str, nonce: str) -> bool:
    """Whether it is what the peer itself would say at the end, which nobody could tell apart."""
    try:
        found = msgspec.msgpack.decode(content)
        ours = found[FIELD]
        same = ours["epoch"] == epoch and ours["nonce"] == nonce
        return bool(same and ours["state"] in ("done", "failed"))
    except Exception:
        return False


@pytest.mark.fault("blocks_given_back_too_early")
def test_a_pull_survives_what_no_peer_should_answer(new_world, kv_lab, seed) -> None:
    world, chooser = new_world(2, 1, retries=0), random.Random(seed)
    heard: dict[str, dict[str, Any]] = {}
    see = world.network.seen

    def note(direction: str, address: str, frames: list[bytes]) -> None:
        see(direction, address, frames)
        if direction == "answer":
            found = msgspec.msgpack.decode(frames[-1])
            heard[(found.get(FIELD) or {}).get("state", "")] = found

    world.network.seen = note
    world.request(2, 0.0, 0.0)
    world.loop.pass_time(3)
    assert {"accepted", "ready", "done"} <= set(heard)
    known = [copy.deepcopy(heard[state]) for state in ("accepted", "ready", "done")]
    failed = copy.deepcopy(known[0])
    failed[FIELD]["state"] = "failed"
    unpatched = {"status": 2, "err_msg": "no"}
    given = messages(chooser, [*known, failed, unpatched], EACH_SIDE)
    template = known[0][FIELD]["epoch"].encode()
    tried, slowest, pulls = 0, 0.0, 0
    with Memory() as memory:
        while tried < EACH_SIDE:
            # A write that stalls: until it ends the blocks are not given back.
            from kv_simulation import Fortune

            world.prefill[0].engine.threads.fortunes.append(Fortune(stalls=True))
            one = world.request(1, 0.0, 0.0)
            world.loop.pass_time(0.05)
            pulls += 1
            dealer = next(
                d
                for d in world.network.dealers
                if d.wire is not None and d.wire.address == world.addresses[0]
            )
            ours = heard["ready"][FIELD]
            epoch, nonce = ours["epoch"], ours["nonce"]
            for _ in range(TO_ONE_PULL):
                content = next(given, b"\xc1").replace(template, epoch.encode())
                tried += 1
                if forged(content, epoch, nonce):
                    continue
                say = lambda m=content, d=dealer: d.closed or d.arrive([m])  # noqa: E731
                slowest = max(slowest, check_cost(world, say, content))
                if one.back and world.writes:
                    pytest.fail(f"the blocks were given back in mid-write after {content[:900]!r}")
            for write in world.writes:
                write.end()
            back = world.loop.until(lambda one=one: one.back, 60)
            assert back, "the write has ended, and the blocks are still held"
            # What the request left at prefill is no part of this test.
            world.loop.until(lambda one=one: one.freed, 120, step=5.0)
            assert not world.violations, world.violations
            if kv_lab.lines.tracebacks:
                pytest.fail(kv_lab.lines.tracebacks[0])
            world.requests = {one.number: one}
        growth = memory.growth
    assert growth < MOST_BYTES, f"{growth >> 20} MiB more"
    assert not world.loop.complaints
    world.loop.pass_time(5)
    assert not world.network.open_sockets(world.decode_process)
    last = world.request(2, 0.0, 0.0)
    assert world.loop.until(lambda: last.ended == "loaded", 20), "no request is served any more"
    shown = f"slowest {1e3 * slowest:.1f} ms of CPU, growth {growth / 2**20:.1f} MiB, {pulls} pulls"
    what = "KV wire: answers to a decode rank of vLLM's connector"
    tally(what, tried=tried, unit="messages", seed=seed, note=shown)

"""Writes to a peer over TCP: no more at once than its queue takes, and nothing left behind."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque

import pytest

from ascend_patch.impl import kv_vllm_engine
from ascend_patch.impl.kv_vllm_engine import FAILED, WINDOW, WRITTEN, Writer


class Engine:
    """Mooncake's queue for a peer: some ranges are written each time that it is asked."""

    def __init__(self, rate: int = 3) -> None:
        self.rate = rate
        self.queue: deque[int] = deque()
        self.states: dict[int, int] = {}
        self.taken: list[tuple[str, int, int, int]] = []
        self.most = 0
        self.fails: set[int] = set()
        self.refuses: set[int] = set()
        self.refusal = 0

    def transfer_submit_write(self, session: str, local: int, remote: int, length: int) -> int:
        number = len(self.taken) + 1
        self.taken.append((session, local, remote, length))
        if number in self.refuses:
            return self.refusal
        self.queue.append(number)
        self.most = max(self.most, len(self.queue))
        return number

    def transfer_check_status(self, number: int) -> int:
        for _ in range(min(self.rate, len(self.queue))):
            done = self.queue.popleft()
            self.states[done] = FAILED if done in self.fails else WRITTEN
        # A state is given once: the engine forgets the range with it.
        return self.states.pop(number, 0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_vllm_engine, "LONGEST_PAUSE_S", 0.0002)


def ranges(count: int) -> tuple[list[int], list[int], list[int]]:
    return tuple(random.sample(range(10**6), count) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [0, 1, WINDOW, 5 * WINDOW + 3])
def test_all_is_written_in_order_and_no_more_at_once_than_a_window(count) -> None:
    engine = Engine()
    local, remote, lengths = ranges(count)
    assert Writer(engine).write("peer:1", local, remote, lengths) == 0
    assert engine.taken == [("peer:1", *one) for one in zip(local, remote, lengths, strict=True)]
    assert engine.most == min(count, WINDOW)
    assert not engine.queue
    assert not engine.states


@pytest.mark.parametrize("refusal", [0, 2**64 - 1], ids=["0.3.13", "older"])
@pytest.mark.parametrize("kind", ["fails", "refuses"])
def test_after_a_failure_nothing_is_on_its_way(kind, refusal) -> None:
    engine = Engine()
    engine.refusal = refusal
    getattr(engine, kind).add(2 * WINDOW)
    assert Writer(engine).write("peer:1", *ranges(8 * WINDOW)) == -1
    # What was handed over has ended; the rest was not handed over.
    assert not engine.queue
    assert not engine.states
    assert 2 * WINDOW <= len(engine.taken) <= 3 * WINDOW + engine.rate


class Peers:
    """One engine's queues for several peers."""

    def __init__(self, **queues: Engine) -> None:
        self.queues = queues

    def transfer_submit_write(self, session: str, *one: int) -> tuple[str, int]:
        return session, self.queues[session].transfer_submit_write(session, *one)

    def transfer_check_status(self, which: tuple[str, int]) -> int:
        session, number = which
        return self.queues[session].transfer_check_status(number)


def test_two_pushes_to_a_peer_take_turns_and_others_do_not_wait() -> None:
    stopped, free = Engine(rate=0), Engine()
    writer = Writer(Peers(stopped=stopped, free=free))
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(writer.write("stopped", *ranges(WINDOW))))
        for _ in range(2)
    ]
    for one in threads:
        one.start()
    assert writer.write("free", *ranges(2 * WINDOW)) == 0
    time.sleep(0.05)
    assert len(stopped.taken) == WINDOW
    assert not codes
    stopped.rate = 5
    for one in threads:
        one.join(20)
    assert codes == [0, 0]
    assert stopped.most == WINDOW


def test_what_takes_long_is_said_and_not_given_up(monkeypatch, kv_lines) -> None:
    monkeypatch.setattr(kv_vllm_engine, "SLOW_S", 0.05)
    engine = Engine(rate=0)
    threading.Timer(0.2, lambda: setattr(engine, "rate", 1)).start()
    assert Writer(engine).write("10.0.0.1:7", *ranges(4)) == 0
    assert "kv push to 10.0.0.1:7: Mooncake has written nothing for" in kv_lines.text
    assert "and 4 ranges are on their way; the blocks are kept" in kv_lines.text


def test_it_does_not_spin(monkeypatch) -> None:
    monkeypatch.setattr(kv_vllm_engine, "LONGEST_PAUSE_S", 0.005)
    engine = Engine(rate=0)
    threading.Timer(0.5, lambda: setattr(engine, "rate", 1)).start()
    before = time.thread_time()
    assert Writer(engine).write("peer:1", *ranges(1)) == 0
    assert time.thread_time() - before < 0.25


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to be bound to")
def test_threads_of_a_bound_worker_run_on_all_its_cores() -> None:
    wide = os.sched_getaffinity(0)
    narrow = {min(wide)}
    seen: dict[str, set[int]] = {}

    def look(name: str) -> None:
        seen[name] = os.sched_getaffinity(0)

    def bound() -> None:
        # A thread of its own, as vLLM's worker binds its main one; others were there before.
        os.sched_setaffinity(0, narrow)
        for name in ("before", "inside", "after"):
            thread = threading.Thread(target=look, args=(name,))
            if name == "inside":
                with kv_vllm_engine.all_cores():
                    thread.start()
            else:
                thread.start()
            thread.join()
        look("itself")

    one = threading.Thread(target=bound)
    one.start()
    one.join()
    assert seen == {"before": narrow, "inside": wide, "after": narrow, "itself": narrow}

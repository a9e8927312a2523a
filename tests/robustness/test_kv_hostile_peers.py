"""Floods from other processes against a live listener: its memory, and how long others wait.

The listener is a process of its own, with vLLM's worker class and real sockets; so is each peer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from kv_flood import FIELD, changed
from tally import tally

SCRIPT = Path(__file__).with_name("kv_flood.py")
EVERYDAY, MANY = 5_000, 100_000
# A listener takes some hundred connections a second from one machine.
FEW = {"half-open": 500, "identities": 500}
KINDS = (
    "ask",
    "unknown",
    "go",
    "cancel",
    "garbage",
    "frames",
    "unpatched",
    "identities",
    "half-open",
    "oversized",
)
# 100 ms, and as much again for a machine on which others take the cores and their caches.
MOST_BYTES, MOST_MS = 16 << 20, 200
# 4,096 attempts under way have some 9 KB each. With fewer, early questions of a large decode server
# would be refused: its ranks may ask before the prefill server has the requests.
MORE_BYTES = {"unknown": 48 << 20}
# A peer that asks this often is well-behaved.
PAUSE_S = 0.02
PATIENCE_S = 20.0
# After which an attempt that nobody goes on with is over (kv_ranks), and a little more.
EXPIRES_S = 13.0


class Child:
    """A process that prints a line when it is ready, and ends when its standard input does."""

    def __init__(self, *args: str, log: Path) -> None:
        env = os.environ | {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "480", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *args],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=env,
                text=True,
            )
        self.log = log

    def line(self, seconds: float) -> str:
        """What it prints when it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for one in self.log.read_text(errors="replace").splitlines(keepends=True):
                if one.startswith("tcp://") and one.endswith("\n"):
                    return one
            time.sleep(0.05)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    @property
    def memory(self) -> int:
        """Bytes that are resident."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu(self) -> float:
        """Seconds that its loop's thread has run."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e9

    def stop(self) -> None:
        if self.process.poll() is None:
            try:
                self.process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Peer:
    """A well-behaved decode rank: asks, is answered, and gives up again."""

    def __init__(self, address: str, ask: dict[str, Any]) -> None:
        self.ask, self.count, self.refused = ask, 0, False
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def seconds(self) -> float:
        """How long an answer takes."""
        self.count += 1
        name = f"peer-{self.count}"
        message = changed(self.ask, name, kind="ask")
        began, other = time.perf_counter(), None
        self.socket.send(msgspec.msgpack.encode(message))
        while True:
            left = began + PATIENCE_S - time.perf_counter()
            assert left > 0, f"no answer after {PATIENCE_S:.0f} s, but {other}"
            if self.socket.poll(int(1000 * left) + 1):
                answer = other = msgspec.msgpack.decode(self.socket.recv_multipart()[-1])
                if (answer.get(FIELD) or {}).get("epoch") == f"{name}-0":
                    self.refused = answer[FIELD]["state"] == "failed"
                    break
        taken = time.perf_counter() - began
        given_up = changed(self.ask, name, kind="cancel", last=True)
        self.socket.send(msgspec.msgpack.encode(given_up))
        return taken


class Site:
    """A listener, and a well-behaved peer of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = Child("listener", log=folder / "listener.log")
        self.address, self.template = self.listener.line(120).split()
        self.ask = msgspec.msgpack.decode(bytes.fromhex(self.template))
        self.peer = Peer(self.address, self.ask)

    def seconds(self) -> float:
        """How long a well-behaved peer waits for the listener: for what that does meanwhile.

        On a machine whose cores others take, an answer is late though the listener does nothing.
        """
        before = self.listener.cpu
        waited = self.peer.seconds()
        return min(waited, self.listener.cpu - before)

    def flood(self, kind: str, count: int, seed: int) -> tuple[list[float], int]:
        """(seconds of each answer, the most memory) while a flood goes on."""
        child = Child(kind, self.address, str(count), str(seed), log=self.folder / f"{kind}.log")
        try:
            assert child.process.stdin is not None
            child.process.stdin.write(self.template + "\n")
            child.process.stdin.flush()
            answers, most = [], 0
            end = time.monotonic() + 60 + count / 200
            while child.process.poll() is None or len(answers) < 20:
                assert time.monotonic() < end, f"{count} messages of kind {kind} are not taken"
                try:
                    answers.append(self.seconds())
                except AssertionError as error:
                    self.listener.process.send_signal(signal.SIGUSR1)
                    time.sleep(0.5)
                    said = self.listener.log.read_text(errors="replace")[-5000:]
                    raise AssertionError(f"{kind}: {error}; the listener: {said}") from None
                most = max(most, self.listener.memory)
                time.sleep(PAUSE_S)
            said = child.log.read_text(errors="replace")
            assert child.process.returncode == 0, said[-2000:]
        finally:
            child.stop()
        return answers, most

    def stop(self) -> None:
        self.peer.socket.close(0)
        self.listener.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    made = Site(tmp_path_factory.mktemp("kv-flood"))
    # What is allocated once, for any number of messages.
    for kind in ("unknown", "garbage", "half-open"):
        made.flood(kind, 300, 0)
    yield made
    made.stop()


def check(site: Site, kind: str, count: int, seed: int) -> None:
    before = site.listener.memory
    answers, most = site.flood(kind, count, seed)
    # What was heard last is still being worked off.
    answers += [site.seconds() for _ in range(5)]
    growth = max(most, site.listener.memory) - before
    slowest = 1e3 * max(answers)
    note = f"{len(answers)} answers, slowest {slowest:.0f} ms, growth {growth / 2**20:.1f} MiB"
    assert growth < MORE_BYTES.get(kind, MOST_BYTES), f"{kind}: {note}"
    assert slowest < MOST_MS, f"{kind}: {note}"
    said = site.listener.log.read_text(errors="replace")
    assert "Traceback" not in said, said[said.index("Traceback") :][:3000]
    tally(f"KV listener flooded: {kind}", tried=count, unit="messages", seed=seed, note=note)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_neither_grows_memory_nor_keeps_others_waiting(site, kind, seed) -> None:
    check(site, kind, FEW.get(kind, EVERYDAY), seed)


def test_attempts_that_time_out_together_keep_nobody_waiting(site, seed) -> None:
    # As many as may be under way; each is over 10 s after it came.
    site.flood("unknown", EVERYDAY, seed)
    answers, end = [], time.monotonic() + EXPIRES_S
    while time.monotonic() < end:
        answers.append(site.seconds())
        time.sleep(PAUSE_S)
    note = f"slowest {1e3 * max(answers):.0f} ms"
    assert 1e3 * max(answers) < MOST_MS, note
    # The control: they are over, and others may come.
    assert not site.peer.refused
    tally("KV listener: attempts time out together", tried=EVERYDAY, unit="attempts", note=note)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_messages_of_a_kind(site, kind, seed) -> None:
    check(site, kind, MANY, seed)

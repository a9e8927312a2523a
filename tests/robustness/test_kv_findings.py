"""What ends a quarantine, what a lost first word costs, and time-outs that come together."""

from __future__ import annotations

import asyncio
import importlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import kv_peer
import pytest
import zmq
from kv_peer import Peer, Prefill
from kv_ranks import BLOCKS, D_BLOCKS, World, wait_until

from ascend_patch.impl import kv_vllm, kv_vllm_link, kv_vllm_quarantine
from ascend_patch.impl.kv_vllm_wire import ACCEPTED, ASK, DONE, GO


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's connector module."""
    return kv_peer.connector(monkeypatch)


# A process that closes its side channel and goes on, as vLLM's shutdown does.
CLOSES = """
import socket, sys
from ascend_patch.impl import kv_vllm_process
print(kv_vllm_process.port(sys.argv[1]), flush=True)
sys.stdin.readline()
"""


def process(host: str = "127.0.0.1") -> tuple[subprocess.Popen[str], int]:
    """A process with a port that says whether it is there."""
    found = subprocess.Popen(
        [sys.executable, "-c", CLOSES, host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert found.stdout is not None
    return found, int(found.stdout.readline())


def test_a_side_channel_that_is_closed_is_no_end_of_its_process(host) -> None:
    """Blocks go back when the process ends, and not when it refuses messages."""
    alive, port = process()

    async def run() -> None:
        async with World(host, 1, 1, timeout=1.0, retries=0) as world:
            world.receivers[0].repeat = 0.2
            with Prefill(world) as prefill:
                prefill.said["process_port"] = port
                await world.pull(1, D_BLOCKS)
                await prefill.allowed()
                await asyncio.sleep(0.3)
            # ZMQ closes it in a thread of its own.
            for _ in range(600):
                if await kv_vllm_link.is_refused(f"tcp://127.0.0.1:{prefill.port}"):
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("the side channel is still open after 30 s")
            await asyncio.sleep(3 * kv_vllm_quarantine.SETTLE_S)
            assert not world.pulled(1)
            alive.kill()
            alive.wait()
            await wait_until(lambda: world.pulled(1), 30)

    try:
        asyncio.run(run())
    finally:
        alive.kill()
        alive.wait()


@pytest.mark.parametrize("port", [None, 1], ids=["0.1.0", "a firewall"])
def test_a_process_without_a_port_that_was_reached_keeps_its_blocks(host, port) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=1.0, retries=0) as world:
            world.receivers[0].repeat = 0.2
            with Prefill(world) as prefill:
                del prefill.said["process_port"]
                if port is not None:
                    prefill.said["process_port"] = port
                await world.pull(1, D_BLOCKS)
                await prefill.allowed()
            await asyncio.sleep(3 * kv_vllm_quarantine.SETTLE_S)
            assert not world.pulled(1)

    asyncio.run(run())


def test_the_port_of_a_process_is_never_refused_while_it_is_there() -> None:
    """A thousand probes, more at once than are accepted at a time, and then its end."""
    alive, port = process()
    address = f"tcp://127.0.0.1:{port}"

    async def run() -> None:
        for _ in range(10):
            found = await asyncio.gather(*(kv_vllm_link.is_refused(address) for _ in range(100)))
            assert not any(found)
        assert await kv_vllm_link.is_reached(address)
        alive.kill()
        alive.wait()
        assert await kv_vllm_link.is_refused(address)

    try:
        asyncio.run(run())
    finally:
        alive.kill()
        alive.wait()


def test_the_port_of_a_process_is_one_and_outlives_its_threads() -> None:
    opened = importlib.import_module("ascend_patch.impl.kv_vllm_process")
    assert opened.port("127.0.0.1") == opened.port("127.0.0.1")
    with pytest.raises(OSError, match="assign"):
        # A network for documentation: no machine has it.
        opened.port("192.0.2.7")
    # The interpreter of this one ends while a thread still works.
    code = CLOSES + (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(3,)).start()\n"
        "print('ending', flush=True)\n"
    )
    found = subprocess.Popen(
        [sys.executable, "-c", code, "127.0.0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert found.stdin is not None
    assert found.stdout is not None
    try:
        port = int(found.stdout.readline())
        found.stdin.write("\n")
        found.stdin.flush()
        assert found.stdout.readline() == "ending\n"
        time.sleep(0.5)
        with socket.create_connection(("127.0.0.1", port), 5):
            assert found.poll() is None
        found.wait(30)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)
    finally:
        found.kill()
        found.wait()


def test_a_prefill_rank_names_the_port_of_its_process(host) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def make() -> World:
        return World(host, 1, 1)

    async def register() -> None:
        return None

    world = asyncio.run_coroutine_threadsafe(make(), loop).result(10)
    worker = world.prefill[0].worker
    worker.async_zmq_ctx, worker.sender_loop = world.context, loop
    worker.register_worker_with_bootstrap = register
    try:
        kv_vllm._listen(worker, world.prefill[0].side, "model", list(world.prefill[0].cache))
        port = getattr(worker, kv_vllm.SENDER).said["process_port"]
        assert port != worker.side_channel_port
        with socket.create_connection(("127.0.0.1", port), 5):
            pass
    finally:
        world.context.destroy(0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_time_outs_that_come_together_are_handled_one_at_a_time(host) -> None:
    """Others have their turn between any two of them."""
    many = 400

    async def run() -> None:
        async with World(host, 1, 1) as world:
            sender = getattr(world.prefill[0].worker, kv_vllm.SENDER)
            sender.waiter.timeout = 2.0
            with Peer(world) as peer:
                for number in range(many):
                    await peer.say(ASK, f"e{number}", transfer=f"u{number}")
                    assert await peer.hear(f"e{number}") == ACCEPTED
                # The loop was held, so that all are late.
                time.sleep(4)
                most = ended = 0
                deadline = time.monotonic() + 30
                while ended < many:
                    assert time.monotonic() < deadline
                    before = ended
                    await asyncio.sleep(0)
                    ended = sum(job.ended for job in sender.jobs.values())
                    most = max(most, ended - before)
                assert most <= 2

    asyncio.run(run())


NONSENSE = [
    {"nonce": 7},
    {"nonce": None},
    {"nonce": "n" * 100},
    {"job": "1"},
    {"job": -1},
    {"job": 2**63},
    {"job": True},
    {"process_port": 0},
    {"process_port": "22"},
]


@pytest.mark.parametrize("changes", NONSENSE, ids=str)
def test_an_answer_that_does_not_say_whose_it_is_says_nothing(host, changes) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=5, retries=0) as world:
            world.receivers[0].repeat = 0.2
            with Prefill(world) as prefill:
                await world.pull(1, D_BLOCKS)
                await prefill.hear(ASK)
                await prefill.say(ACCEPTED, **changes)
                await prefill.say("ready")
                await prefill.hear(GO)
                # The right answer alone is kept.
                said = prefill.heard[-1][1]
                assert (said["nonce"], said["job"]) == ("n", 1)
                await prefill.say(DONE)
                await wait_until(lambda: world.pulled(1))
                assert not world.invalid()

    asyncio.run(run())


class Deaf:
    """Passes messages to a prefill rank, but for the first ones, which are lost."""

    def __init__(self, world: World, lost: int) -> None:
        self.world, self.lost = world, lost
        self.front = world.context.socket(zmq.ROUTER)
        self.back = world.context.socket(zmq.DEALER)
        for one in (self.front, self.back):
            one.linger = 0
        self.back.connect(world.addresses[0])
        port = self.front.bind_to_random_port("tcp://127.0.0.1")
        world.addresses[0] = f"tcp://127.0.0.1:{port}"
        self.to = b""

    async def run(self) -> None:
        """Until it is cancelled."""
        await asyncio.gather(self._there(), self._back())

    async def _there(self) -> None:
        while True:
            self.to, data = await self.front.recv_multipart()
            self.lost -= 1
            if self.lost < 0:
                await self.back.send(data)

    async def _back(self) -> None:
        while True:
            data = await self.back.recv()
            await self.front.send_multipart((self.to, data))

    def close(self) -> None:
        """End it."""
        self.front.close()
        self.back.close()


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_blocks_come_back_where_the_first_word_was_lost(host, patched) -> None:
    """The control is an unpatched prefill rank, which cannot say that nobody writes."""

    async def run() -> None:
        world = World(host, 1, 1, patched=(patched, True), timeout=1.0, retries=0)
        async with world:
            world.receivers[0].repeat = 0.2
            deaf = Deaf(world, 1)
            task = asyncio.ensure_future(deaf.run())
            try:
                await world.pull(1, D_BLOCKS)
                invalid: set[int] = set()
                await wait_until(lambda: bool(invalid.update(world.invalid()) or invalid))
                if patched:
                    await wait_until(lambda: world.pulled(1))
                    assert world.receivers[0].quarantine.blocks == 0
                else:
                    await asyncio.sleep(2)
                    assert not world.pulled(1)
                    # It serves others all the same.
                    others = [one for one in range(BLOCKS) if one not in D_BLOCKS]
                    assert world.untouched(others)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                deaf.close()

    asyncio.run(run())


def test_a_rank_that_another_request_heard_is_asked_again(host) -> None:
    async def run() -> None:
        async with World(host, 1, 1, timeout=8, retries=0) as world:
            world.receivers[0].repeat = 0.2
            with Prefill(world) as prefill:
                for number in (1, 2):
                    await world.pull(number, [number])
                    await prefill.hear(ASK)
                # The second alone is answered; then the first one is asked for again.
                await prefill.say(ACCEPTED)
                second = prefill.heard[-1][1]["epoch"]
                while prefill.heard[-1][1]["epoch"] == second:
                    await prefill.hear(ASK)
                await prefill.say(ACCEPTED)
                await prefill.say("ready")
                await prefill.hear(GO)
                await prefill.say(DONE)
                await wait_until(lambda: world.pulled(1))
                assert not world.invalid()

    asyncio.run(run())


def test_no_range_leaves_the_region_that_it_begins_in(host, seed) -> None:
    """Regions are registered one by one, and an allocator may put one behind the other."""
    # The last block of a region goes before the first one of the next.
    order = list(range(1, BLOCKS - 1))
    random.Random(seed).shuffle(order)
    order = [0, *order, BLOCKS - 1]

    async def run() -> None:
        async with World(host, 1, 2) as world:
            for rank in (*world.prefill, *world.decode):
                # They are: the regions are parts of one tensor.
                bases = rank.worker.kv_caches_base_addr
                assert bases[1] - bases[0] == BLOCKS * rank.worker.block_len
            written: list[tuple[int, int]] = []
            for rank in world.prefill:
                write = rank.worker._send_blocks

                def noted(session: str, sources: Any, targets: Any, lengths: Any, w=write) -> int:
                    written.extend(zip(targets, lengths, strict=True))
                    return int(w(session, sources, targets, lengths))

                rank.worker._send_blocks = noted
            await world.prefilled(1, order)
            await world.pull(1, order)
            await wait_until(lambda: world.pulled(1))
            assert world.right(1, order)
            assert written
            regions = [
                (base, base + BLOCKS * rank.worker.block_len)
                for rank in world.decode
                for base in rank.worker.kv_caches_base_addr
            ]
            for target, length in written:
                assert any(begin <= target and target + length <= end for begin, end in regions)

    asyncio.run(run())

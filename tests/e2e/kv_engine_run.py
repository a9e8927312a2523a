"""Mooncake's real engine between two processes, without vLLM: what `kv_vllm_engine` does with it.

Run by test_kv_engine_e2e.py with an interpreter that has both; prints what it saw as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZE = 32 << 20


def start_engine() -> tuple[Any, np.ndarray]:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    buffer = np.zeros(SIZE, np.uint8)
    assert engine.batch_register_memory([buffer.ctypes.data], [SIZE]) == 0
    return engine, buffer


def receive(pipe: Any) -> None:
    engine, buffer = start_engine()
    pipe.send((engine.get_rpc_port(), buffer.ctypes.data))
    while pipe.recv() == "bytes":
        pipe.send(buffer)
        buffer[:] = 0


class Peer:
    """A process that is written to."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=receive, args=(theirs,), daemon=True)
        self.process.start()
        port, self.address = self.pipe.recv()
        self.session = f"127.0.0.1:{port}"

    def bytes(self) -> np.ndarray:
        self.pipe.send("bytes")
        return self.pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def ranges(buffer: np.ndarray, peer: Peer, count: int, length: int) -> tuple[Any, ...]:
    """Each second piece of both buffers, so that nothing lies together."""
    offsets = [2 * number * length for number in range(count)]
    local, remote = ([base + x for x in offsets] for base in (buffer.ctypes.data, peer.address))
    return peer.session, local, remote, [length] * count


def expected(buffer: np.ndarray, count: int, length: int) -> np.ndarray:
    found = np.zeros_like(buffer)
    pieces = slice(0, 2 * count * length)
    rows, wanted = (x[pieces].reshape(count, 2, length) for x in (buffer, found))
    wanted[:, 0] = rows[:, 0]
    return found


def meanwhile(write: Callable[[], int]) -> tuple[threading.Thread, dict[str, float]]:
    """Write in a thread; its code, its seconds, and its seconds on a core appear in the dict."""
    found: dict[str, float] = {}

    def run() -> None:
        began = time.monotonic()
        found["code"] = write()
        found["seconds"], found["on_core"] = time.monotonic() - began, time.thread_time()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def main(count: int, length: int, pause: float) -> dict[str, Any]:
    from ascend_patch.impl.kv_vllm_engine import Writer

    engine, buffer = start_engine()
    buffer[:] = np.random.default_rng().integers(1, 256, SIZE, np.uint8)
    writer, found, peer = Writer(engine), {}, Peer()

    began = time.monotonic()
    many = writer.write(*ranges(buffer, peer, count, length))
    found["many"] = {"code": many, "seconds": time.monotonic() - began}
    found["many"]["right"] = bool((peer.bytes() == expected(buffer, count, length)).all())

    large = SIZE // 16
    peer.signal(signal.SIGSTOP)
    thread, found["stopped"] = meanwhile(lambda: writer.write(*ranges(buffer, peer, 8, large)))
    time.sleep(pause)
    waited = thread.is_alive()
    peer.signal(signal.SIGCONT)
    thread.join()
    found["stopped"]["waited"] = waited
    found["stopped"]["right"] = bool((peer.bytes() == expected(buffer, 8, large)).all())

    peer.signal(signal.SIGSTOP)
    thread, found["killed"] = meanwhile(lambda: writer.write(*ranges(buffer, peer, 8, large)))
    time.sleep(pause)
    found["killed"]["waited"] = thread.is_alive()
    peer.signal(signal.SIGKILL)
    thread.join()

    other = Peer()
    again = writer.write(*ranges(buffer, other, 8, large))
    right = bool((other.bytes() == expected(buffer, 8, large)).all())
    found["another"] = {"code": again, "right": right}

    # The control: the engine's own call, of as many ranges.
    code = engine.batch_transfer_sync_write(*ranges(buffer, other, count, length))
    found["host"] = {"code": code}
    other.signal(signal.SIGKILL)
    return found


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    count, length, pause = json.loads(sys.argv[1])
    print(json.dumps(main(count, length, pause)), flush=True)
    # The engine's own threads are not waited for.
    os._exit(0)

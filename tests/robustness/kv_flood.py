"""Processes for the tests of hostile peers: a live listener, and those that flood it.

kv_flood.py listener            prints its address; ends when its standard input does
kv_flood.py KIND ADDRESS COUNT SEED
                                sends so many messages of a kind, of the ask that it reads (hex)
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import random
import resource
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "unit"), str(HERE.parent)]

FIELD = "ascend_patch"
encode = msgspec.msgpack.Encoder().encode
# Connections that one process holds open at once.
OPEN_AT_ONCE = 300
# ZMTP 3.0 with the NULL mechanism: a greeting, and READY of a DEALER.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


async def listen() -> None:
    """A prefill rank of TP 1 with one request that has been computed, until stdin ends."""
    # Where it stands, for those who wait for it.
    faulthandler.register(signal.SIGUSR1)
    package, engine = types.ModuleType("mooncake"), types.ModuleType("mooncake.engine")
    engine.TransferEngine = object  # type: ignore[attr-defined]
    try:
        importlib.import_module("mooncake.engine")
    except ImportError:
        sys.modules |= {"mooncake": package, "mooncake.engine": engine}
    import kv_engine
    import kv_ranks

    host = importlib.import_module(kv_engine.MODULE)
    async with kv_ranks.World(host, 1, 1) as world:
        await world.prefilled(1, [1, 2])
        # A true message of a decode rank, of which floods are made.
        receiver = world.receivers[0]
        pull = types.SimpleNamespace(
            request="d1", transfer="t1", blocks=[3, 4], meta=world.meta(1, [3, 4]), attempt=0
        )
        ask = receiver.ask(pull, 0, True, 1, 0)
        print(world.addresses[0], encode(ask).hex(), flush=True)
        # As vLLM does when it has started: a full collection of all its objects takes a second.
        gc.collect()
        gc.freeze()
        loop, rank = asyncio.get_running_loop(), world.prefill[0]
        ended = loop.run_in_executor(None, sys.stdin.read)
        while not ended.done():
            # What vLLM's worker does between its steps.
            await rank.worker.fetch_finished_sending_reqs()
            await asyncio.sleep(0.02)


def changed(ask: dict[str, Any], number: str, **changes: Any) -> dict[str, Any]:
    """The same of another attempt at another request."""
    field = ask[FIELD] | {"epoch": f"{number}-0", "transfer": number, "rank": 0} | changes
    return ask | {"req_blocks": {number: [number, [1, 2]]}, FIELD: field}


def contents(kind: str, ask: dict[str, Any], count: int, chooser: random.Random) -> Iterator[bytes]:
    """Messages of a kind."""
    for number in range(count):
        name = f"{kind}-{chooser.getrandbits(64):x}"
        if kind in ("ask", "identities"):
            # For a request that is there: what is waited for is leave to write.
            message = changed(ask, name) | {"req_blocks": {"d1": ["t1", [3, 4]]}}
            yield encode(message)
        elif kind == "unknown":
            yield encode(changed(ask, name))
        elif kind == "unpatched":
            message = changed(ask, name) | {"remote_hostname": "127.0.0.1"}
            yield encode({k: v for k, v in message.items() if k != FIELD})
        elif kind in ("go", "cancel"):
            yield encode(changed(ask, name, kind=kind, last=bool(number % 2)))
        elif kind == "garbage":
            yield chooser.randbytes(chooser.randrange(300))
        else:
            raise SystemExit(f"no kind {kind!r}")


def flood(kind: str, address: str, count: int, seed: int) -> None:
    """Send, and read no answer."""
    ask = msgspec.msgpack.decode(bytes.fromhex(sys.stdin.readline()))
    chooser = random.Random(seed)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, max(soft, hard)), hard))
    if kind in ("oversized", "half-open"):
        _raw(kind, address, count)
    elif kind == "frames":
        _say(address, ([b"", b"x"] if n % 2 else [b"a", b"b", b"c"] for n in range(count)))
    elif kind == "identities":
        context = zmq.Context.instance()
        for content in contents(kind, ask, count, chooser):
            with _socket(context) as dealer:
                dealer.setsockopt(zmq.IDENTITY, chooser.randbytes(200).replace(b"\0", b"x"))
                dealer.setsockopt(zmq.LINGER, 10_000)
                dealer.connect(address)
                dealer.send(content)
    else:
        _say(address, ([content] for content in contents(kind, ask, count, chooser)))


def _socket(context: zmq.Context[Any]) -> zmq.Socket[bytes]:
    """A DEALER; those that were closed are gone a little later."""
    while True:
        try:
            return context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            if error.errno != zmq.EMFILE:
                raise
            time.sleep(0.01)


def _say(address: str, messages: Iterator[list[bytes]]) -> None:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 60_000)
    dealer.connect(address)
    for frames in messages:
        dealer.send_multipart(frames)
    dealer.close()
    zmq.Context.instance().term()


def _raw(kind: str, address: str, count: int) -> None:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    opened: list[socket.socket] = []
    refused = 0
    for number in range(count):
        one = socket.create_connection((host, int(port)), timeout=30)
        # Closed by a reset: no port waits for its old packets.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        opened.append(one)
        if kind == "half-open":
            one.sendall(GREETING[: number % 64])
        else:
            refused += _is_refused(one)
        if len(opened) >= (OPEN_AT_ONCE if kind == "half-open" else 1):
            opened.pop(0).close()
    for one in opened:
        one.close()
    if kind == "oversized" and refused < count:
        raise SystemExit(f"{count - refused} of {count} oversized frames were not refused")


def _is_refused(one: socket.socket) -> bool:
    """Whether the listener ends the connection at a frame of 2**40 bytes."""
    one.sendall(GREETING)
    _all(one, 64)
    one.sendall(READY)
    one.settimeout(5)
    try:
        one.sendall(b"\x02" + struct.pack(">Q", 2**40) + bytes(100))
        while one.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def _all(one: socket.socket, count: int) -> None:
    while count > 0:
        got = one.recv(count)
        if not got:
            raise OSError("the connection has ended")
        count -= len(got)


if __name__ == "__main__":
    if sys.argv[1] == "listener":
        asyncio.run(listen())
    else:
        flood(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

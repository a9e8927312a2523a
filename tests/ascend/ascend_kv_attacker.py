"""Sends messages of one kind to a prefill rank; or is a well-behaved peer, and times its answers.

    python ascend_kv_attacker.py attack PORT KIND COUNT SEED
    python ascend_kv_attacker.py ask PORT SECONDS

A process of its own, so that its memory and its time are not the rank's.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time

import msgspec
import zmq

META, DONE = b"get_meta_msg", b"done_recving_msg"
encode = msgspec.msgpack.encode


def forms(kind: str, draw: random.Random, port: int) -> list[list[bytes]]:
    """Some messages of a kind, as frames, of which each is sent many times."""
    if kind == "undecodable":
        return [[b"", draw.randbytes(draw.randrange(1, 200))] for _ in range(200)]
    if kind == "unread answers":
        return [[b"", encode((META, ""))]]
    if kind == "many frames":
        return [[b"x"] * draw.randrange(2, 60) for _ in range(20)]
    if kind == "large":
        # Those beyond the limit cost their sender the connection.
        opening = b"\x93\xc4\x10" + DONE + b"\xa1a"
        return [
            [b"", b"\x91" * 60_000],
            [b"", opening + b"\xdc\xff\xff" + b"\x90" * 64_000],
            [b"", opening + encode({number: {} for number in range(12_000)})],
        ]
    if kind == "unknown kinds":
        parts = (b"", b"other", "get_meta_msg", 5, None, [], {}, [[1]])
        return [[b"", encode((draw.choice(parts), draw.choice(parts)))] for _ in range(200)]
    names = [f"{draw.random()}" * draw.choice((1, 1, 10)) for _ in range(20_000)]
    if kind == "ends of unknown requests":
        return [[b"", encode((DONE, name, {}))] for name in names]
    if kind == "counts of unknown requests":
        counts = {port: {"num": 4000, "host": "a"}}
        return [[b"", encode((DONE, name, counts))] for name in names]
    if kind == "nonsense counts":
        values = (5, "a", [1], {port: 5}, {port: {"num": -1}}, {port: {"num": 1 << 62}}, {1: {}})
        return [[b"", encode((DONE, name, draw.choice(values)))] for name in names[:500]]
    if kind == "questions":
        return [[b"", encode((b"ascend_patch_held", name, "a"))] for name in names[:500]]
    raise ValueError(kind)


KINDS = (
    "undecodable",
    "unread answers",
    "many frames",
    "large",
    "unknown kinds",
    "ends of unknown requests",
    "counts of unknown requests",
    "nonsense counts",
    "questions",
)


def attack(port: int, kind: str, count: int, seed: int) -> None:
    """Send them, and stay until they have been taken."""
    messages = forms(kind, random.Random(seed), port)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 100)
    # Of its answers it reads none; so many are taken from the wire at most.
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.RCVBUF, 4096)
    socket.connect(f"tcp://127.0.0.1:{port}")
    for number in range(count):
        socket.send_multipart(messages[number % len(messages)])
    print("sent", flush=True)
    sys.stdin.read()


def ask(port: int, seconds: float) -> None:
    """The slowest answers in milliseconds: of the rank, and of a peer that nobody attacks."""
    context = zmq.Context()
    quiet = context.socket(zmq.ROUTER)
    other = quiet.bind_to_random_port("tcp://127.0.0.1")

    def echo() -> None:
        while True:
            quiet.send_multipart(quiet.recv_multipart())

    threading.Thread(target=echo, daemon=True).start()
    waits: dict[int, list[float]] = {port: [], other: []}
    sockets = {}
    for one in waits:
        sockets[one] = context.socket(zmq.REQ)
        sockets[one].connect(f"tcp://127.0.0.1:{one}")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for one, found in waits.items():
            began = time.monotonic()
            sockets[one].send(encode((META, "")))
            if not sockets[one].poll(20_000):
                found.append(20_000.0)
                deadline = 0.0
                break
            sockets[one].recv()
            found.append((time.monotonic() - began) * 1000)
        time.sleep(0.005)
    print(json.dumps({"rank": sorted(waits[port]), "quiet": sorted(waits[other])}), flush=True)
    sys.stdout.flush()
    import os

    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "attack":
        attack(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        ask(int(sys.argv[2]), float(sys.argv[3]))

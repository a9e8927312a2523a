"""What anybody may send to MooncakeConnectorV1's ranks; import it after `ascend_kv`.

Everything here goes through the release's own sockets, threads and trackers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq
from ascend_kv import NEWEST, OLDEST, ROLES, Pair, host, scheduler
from ascend_kv_attacker import KINDS
from ascend_kv_engine import HOST, Engine, free_port
from ascend_kv_pulled import LOCAL, REMOTE

ATTACKER = Path(__file__).with_name("ascend_kv_attacker.py")


def resident() -> int:
    """Bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def start(*arguments: Any) -> subprocess.Popen[str]:
    given = [sys.executable, str(ATTACKER), *map(str, arguments)]
    environment = {**os.environ, "ASCEND_PATCHES": "off", "PYTHONPATH": ""}
    return subprocess.Popen(
        given, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(port: int, *message: Any, wait_ms: int = 5000) -> bytes | None:
    """A peer's question and its answer."""
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    try:
        socket.connect(f"tcp://{HOST}:{port}")
        socket.send(msgspec.msgpack.encode(message))
        return socket.recv() if socket.poll(wait_ms) else None
    finally:
        context.destroy(linger=0)


def floods(seed: int, count: int) -> dict[str, Any]:
    """Messages of each kind to one rank, and what a well-behaved peer sees meanwhile."""
    pair, found = Pair(1, 1, 2, seed=seed), {}
    for kind in KINDS:
        # What a first connection and its buffers take.
        start("attack", pair.port, kind, 200, seed).communicate("", 60)
        before = resident()
        attacker = start("attack", pair.port, kind, count, seed)
        peer = start("ask", pair.port, max(1.0, count / 20_000))
        said = attacker.stdout.readline().strip()
        # The rank has taken everything that was sent before.
        deadline = time.monotonic() + 60
        while ask(pair.port, host.GET_META_MSG, "") is None and time.monotonic() < deadline:
            continue
        time.sleep(0.3)
        grown = resident() - before
        heard = json.loads(peer.communicate("", 120)[0])
        attacker.communicate("", 60)
        found[kind] = {
            "sent": said,
            "grown": grown,
            "asked": len(heard["rank"]),
            "slowest": heard["rank"][-1],
            # On a machine with other things to do a peer that nobody attacks waits as well.
            "late": sum(one > 100.0 + heard["quiet"][-1] for one in heard["rank"]),
            "quiet": heard["quiet"][-1],
        }
    found["tracked"] = tracked(pair.prefill[0].kv_send_thread)
    pair.offer("after")
    found["after"] = pair.pull("after", LOCAL, REMOTE)
    found["right"] = pair.right(LOCAL, REMOTE)
    return found


def tracked(thread: Any) -> int:
    """How many names a prefill rank remembers of messages."""
    books = (
        getattr(thread, "port_send_num", ()),
        thread.task_tracker.finished_requests,
        getattr(thread.task_tracker, "record_finished_requests", ()),
    )
    return sum(len(book) for book in books)


def reader(request: str, port: int, number: int, name: str = "", attempt: str = "") -> tuple:
    """A message that a read has ended, of one of `number` readers."""
    counts = {port: {"num": number, "host": HOST}} if number else {}
    middle = () if OLDEST else (counts,)
    said = ({"ascend_patch": {"reader": name, "attempt": attempt}},) if name or attempt else ()
    return (host.DONE_RECVING_MSG, request, *middle, *said)


def ends(seed: int) -> dict[str, Any]:
    """Messages that a read has ended, and what the worker says is free then."""
    pair, found = Pair(1, 1, 2, seed=seed), {}
    worker, port = pair.prefill[0], pair.port

    def free() -> list[str]:
        time.sleep(0.05)
        return sorted(worker.get_finished()[0])

    # A request that is computed still: nothing of it may be freed.
    running = host.MooncakeConnectorMetadata()
    running.reqs_in_batch = {"running"}
    worker.start_load_kv(running)
    ask(port, *reader("running", port, 0))
    found["running"] = free()
    # Its end comes; the message counts now.
    ended = host.MooncakeConnectorMetadata()
    ended.requests_to_send["running"] = time.time()
    worker.start_load_kv(ended)
    found["ran"] = free()
    ask(port, *reader("never", port, 0))
    found["never"] = free()
    # Of an earlier attempt of the same name.
    again = host.MooncakeConnectorMetadata()
    again.reqs_in_batch = {"again"}
    again.requests_to_send["again"] = time.time()
    again.ascend_patch_attempts = {"again": "second"}
    worker.start_load_kv(again)
    ask(port, *reader("again", port, 0, "a", "first"))
    found["earlier"] = free()
    ask(port, *reader("again", port, 0, "a", "second"))
    found["this"] = free()
    if not OLDEST:
        # Two ranks read; one says so twice.
        pair.offer("two")
        for _ in range(2):
            ask(port, *reader("two", port, 2, "a"))
        found["one of two"] = free()
        ask(port, *reader("two", port, 2, "b"))
        found["both"] = free()
    return found


class Impostor:
    """A prefill rank that says what it likes; a listener of its own."""

    def __init__(self, metadata: dict[str, Any], host: str = HOST, port: int = 0) -> None:
        self.host, self.port = host, port or free_port(1)
        self.metadata = metadata
        threading.Thread(target=self._run, daemon=True).start()
        time.sleep(0.1)

    def _run(self) -> None:
        socket = zmq.Context().socket(zmq.ROUTER)
        socket.bind(f"tcp://{self.host}:{self.port}")
        while True:
            identity, *_, payload = socket.recv_multipart()
            asked = msgspec.msgpack.decode(payload)[0] == host.GET_META_MSG
            said = msgspec.msgpack.encode(self.metadata) if asked else b"ACK"
            socket.send_multipart((identity, b"", said))


def pulled(pair: Pair, request: str, remote: list[int], **given: Any) -> dict[str, Any]:
    """A pull with other parameters, and how often the engine read for it."""
    before = Engine.reads
    found = pair.metadata(request, LOCAL, remote)
    for name, value in given.items():
        setattr(found.requests[request], name, value)
    worker = pair.decode[0]
    worker.start_load_kv(found)
    return {"heard": pair.heard(worker, request, 15.0), "reads": Engine.reads - before}


def metadata(seed: int) -> dict[str, Any]:
    """Prefill ranks that are not what a request names, and requests that name what is not."""
    pair, found = Pair(1, 1, 2, seed=seed), {}
    thread = pair.prefill[0].kv_send_thread
    said = msgspec.msgpack.decode(msgspec.msgpack.encode(thread.metadata))
    # Another machine of the same engine, with other addresses: memory of this process, all zero.
    other = bytearray(1 << 20)
    base = ctypes.addressof((ctypes.c_char * len(other)).from_buffer(other))
    bases = said["kv_caches_base_addr"]
    caches = [one for layer in pair.prefill[0].kv_caches.values() for one in layer]
    Engine.registered = [(one.data_ptr(), one.numel() * one.element_size()) for one in caches]
    Engine.registered.append((base, len(other)))
    nested = [[base] * len(layer) for layer in bases] if NEWEST else [base] * len(bases)
    short = bases[:1]
    # It says that it is the engine that others read from; they read from that one all the same.
    elsewhere = Impostor({**said, "kv_caches_base_addr": nested}, "127.0.0.2", pair.port)
    pulled(pair, "poisoned", REMOTE, remote_host=elsewhere.host)
    for layer in pair.decode[0].kv_caches.values():
        for cache in layer:
            cache.fill_(-7.0)
    pair.offer("first")
    found["first"] = pulled(pair, "first", REMOTE)
    found["right"] = pair.right(LOCAL, REMOTE)
    pair.offer("behind")
    found["behind the caches"] = pulled(pair, "behind", [1 << 20, 5, 6])
    wrong = {
        "few addresses": {"kv_caches_base_addr": short},
        "negative addresses": {"kv_caches_base_addr": [[-5]] if NEWEST else [-5] * len(bases)},
        "port": {"te_rpc_port": 1 << 20},
        "no blocks": {"num_blocks": 0},
    }
    for name, change in wrong.items():
        asked = {**said, "engine_id": name, "kv_caches_base_addr": nested, **change}
        impostor = Impostor(asked)
        found[name] = pulled(pair, name, REMOTE, remote_port=impostor.port, remote_engine_id=name)
    Engine.registered = []
    return found


def ipv6(seed: int) -> dict[str, Any]:
    """A pull from a prefill server that has an IPv6 address, and a port that is taken."""
    usual, host.get_ip = host.get_ip, lambda: "::1"
    try:
        try:
            pair = Pair(1, 1, 2, seed=seed)
        except RuntimeError as error:
            return {"refused": str(error)}
        pair.offer("six")
        found = pulled(pair, "six", REMOTE, remote_host="::1")
        found["right"] = pair.right(LOCAL, REMOTE)
        try:
            Pair(1, 1, 2, seed=seed, ports=(pair.port, free_port(1)))
        except RuntimeError as error:
            found["taken"] = str(error)
    finally:
        host.get_ip = usual
    return found


def freed(seed: int) -> dict[str, Any]:
    """While a request is read somebody else says that it was read, and prefill frees it."""
    pair, real = Pair(1, 1, 2, seed=seed), Engine.batch_transfer_sync_read
    pair.offer("control")
    control = pulled(pair, "control", REMOTE)

    def read(engine: Any, *given: Any) -> int:
        ask(pair.port, *reader("freed", pair.port, 0))
        pair.prefill[0].get_finished()
        return real(engine, *given)

    Engine.batch_transfer_sync_read = read
    pair.offer("freed")
    try:
        found = pulled(pair, "freed", REMOTE)
    finally:
        Engine.batch_transfer_sync_read = real
    return {
        "control": control["heard"],
        "freed": found["heard"],
        "reads": control["reads"] + found["reads"],
    }


def engines(seed: int, names: int) -> dict[str, Any]:
    """Requests that name so many engines, of which none is there; then one that is."""
    pair = Pair(1, 1, 2, seed=seed)
    thread = pair.decode[0].kv_recv_thread
    transfer = getattr(thread, "_transfer_kv_cache_all_groups" if NEWEST else "_transfer_kv_cache")
    wrap = (lambda blocks: (blocks,)) if hasattr(host, "SupportsHMA") else (lambda b: b)
    for number in range(names):
        pull = {
            "request_id": f"name {number}", "local_block_ids": wrap([1, 2]),
            "remote_block_ids": wrap([1]), "remote_engine_id": f"engine {number}",
            "remote_host": HOST, "remote_handshake_port": 9, "remote_request_id": "x", "offset": 0,
            "tp_num_need_pulls": 1, "num_need_pulls": 1, "group_pulls": [],
        }  # fmt: skip
        try:
            transfer(pull)
        except Exception as error:
            failed = type(error).__name__
    state = thread.__dict__.get("ascend_patch_failures")
    pair.offer("one")
    found = {"failed": failed, "one": pair.pull("one", LOCAL, REMOTE)}
    found["right"] = pair.right(LOCAL, REMOTE)
    found["known"] = len(thread.kv_caches_base_addr)
    found["state"] = state is not None
    return found


def roles(seed: int) -> dict[str, Any]:
    """A request that is sent to the wrong server, and one without what the release asserts."""
    pair, found = Pair(1, 1, 2, seed=seed), {}
    first, second = (scheduler(pair, role) for role in ROLES)
    given = {
        "do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "a",
        "remote_host": HOST, "remote_port": 5, "remote_request_id": "a",
    }  # fmt: skip

    def matched(one: Any, **params: Any) -> Any:
        request = SimpleNamespace(
            request_id="r", kv_transfer_params=params, prompt_token_ids=[1] * 9, arrival_time=0.0
        )
        return list(one.get_num_new_matched_tokens(request, 0))

    found["pull of prefill"] = matched(first, **given)
    found["pull of decode"] = matched(second, **given)
    found["no blocks"] = matched(second, do_remote_prefill=True)
    asked = SimpleNamespace(
        request_id="r",
        status=host.RequestStatus.FINISHED_LENGTH_CAPPED,
        kv_transfer_params={"do_remote_decode": True},
        prompt_token_ids=[1] * 9,
        output_token_ids=[1],
    )
    wrap = (lambda blocks: (blocks,)) if hasattr(host, "SupportsHMA") else (lambda b: b)
    found["decode keeps"] = second.request_finished(asked, wrap([1, 2]))[0]
    found["prefill keeps"] = first.request_finished(asked, wrap([1, 2]))[0]
    return found

"""vllm-ascend's MooncakeConnectorV1: how its ranks reach one another, and wait for an answer."""

from __future__ import annotations

import importlib
import inspect
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl import kv_ascend_said as said
from ascend_patch.impl import kv_handshake

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SILENCE = "ascend_patch_silence"
LEAST_S, MOST_S = 5.0, 60.0
LATER_MS = 60_000
MAX_ENGINES = 1024
CACHES = ("kv_caches_base_addr", "remote_te_port")


@dataclass
class Silence:
    """Peers of a receiving thread that did not answer: they are not waited for at each pull.

    Each wait keeps all other requests of the thread for three seconds.

    Attributes:
        engine: Whose pull the thread is at; a restarted server has another one at its old address.
        asked: Who is asked: engine, host, port.
        until: When they are asked again, and seconds from the last time to then.
    """

    engine: str = ""
    asked: tuple[str, str, int] | None = None
    until: dict[tuple[str, str, int], tuple[float, float]] = field(default_factory=dict)
    context: Any = None

    def ask(self, host: str, port: int) -> float:
        """Someone is asked; seconds for which it is not to be waited for."""
        self.asked = self.engine, host, port
        return max(0.0, self.until.get(self.asked, (0.0, 0.0))[0] - time.monotonic())

    def silent(self) -> None:
        """Who was asked did not answer."""
        if self.asked is not None:
            wait = min(MOST_S, max(LEAST_S, 2 * self.until.get(self.asked, (0.0, 0.0))[1]))
            while len(self.until) >= said.MAX_KNOWN:
                del self.until[next(iter(self.until))]
            self.until[self.asked] = time.monotonic() + wait, wait

    def answered(self) -> None:
        """Who was asked did."""
        if self.asked is not None:
            self.until.pop(self.asked, None)


def silence(thread: Any) -> Silence:
    """Of a receiving thread."""
    found: Silence = thread.__dict__.setdefault(SILENCE, Silence())
    return found


def get_remote_metadata(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._get_remote_metadata: sockets that wait for an answer are not kept.

    The release puts one back that had none; every later message on it fails.
    """
    _get(wrapped, instance, *args, **kwargs)


def _get(wrapped: Wrapped, thread: Any, remote_host: str, remote_handshake_port: int) -> None:
    left = silence(thread).ask(remote_host, remote_handshake_port)
    if left:
        raise RuntimeError(f"it did not answer a while ago, and is asked again in {left:.0f} s")
    try:
        wrapped(remote_host, remote_handshake_port)
    except Exception:
        close(thread, remote_host, remote_handshake_port)
        raise


def send_done_recv_signal(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._send_done_recv_signal: who does not answer is told, and left alone."""
    done(wrapped, instance, *args, **kwargs)


def done(
    wrapped: Wrapped,
    thread: Any,
    request_id: str,
    remote_host: str,
    remote_handshake_port: int,
    *remote_port_send_num: Any,
) -> None:
    """Tell a prefill rank that a request's pull has ended; `remote_port_send_num` from 0.13 on."""
    found = silence(thread)
    if not found.ask(remote_host, remote_handshake_port):
        wrapped(request_id, remote_host, remote_handshake_port, *remote_port_send_num)
        return
    import zmq

    host = importlib.import_module(type(thread).__module__)
    found.context = found.context or zmq.Context()
    socket = found.context.socket(zmq.REQ)
    try:
        # A rank that was only stopped for a while hears of it, and frees the blocks.
        socket.setsockopt(zmq.LINGER, LATER_MS)
        path = host.make_zmq_path("tcp", remote_host, remote_handshake_port)
        socket.setsockopt(zmq.IPV6, int("[" in path))
        socket.connect(path)
        message = (host.DONE_RECVING_MSG, request_id, *remote_port_send_num)
        socket.send(thread.encoder.encode(message), flags=zmq.NOBLOCK)
    finally:
        socket.close()


def close(thread: Any, remote_host: str, remote_handshake_port: int) -> None:
    """The sockets to a prefill rank: one that still waits for an answer cannot be asked again."""
    host = importlib.import_module(type(thread).__module__)
    path = host.make_zmq_path("tcp", remote_host, remote_handshake_port)
    with thread.remote_sockets_lock:
        for sock in thread.remote_sockets.pop(path, ()):
            sock.close(linger=0)


def ensure_zmq_recv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """ensure_zmq_recv: the answer of this socket is waited for.

    The release's poller has all sockets of the thread. One that was closed after a lost answer
    reads as ready, and the next peer that does not answer is waited for without an end.
    """
    bound = inspect.signature(wrapped).bind(*args, **kwargs)
    bound.arguments["poller"] = _Own(bound.arguments["socket"])
    peers = threading.current_thread().__dict__.get(SILENCE, Silence())
    try:
        found = wrapped(*bound.args, **bound.kwargs)
    except RuntimeError:
        peers.silent()
        raise
    peers.answered()
    return found


class _Own:
    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def poll(self, timeout: int) -> list[tuple[Any, int]]:
        events = self._socket.poll(timeout)
        return [(self._socket, events)] if events else []


def asking(thread: Any, req_meta: dict[str, Any]) -> None:
    """Whom a receiving thread asks next, and for which engine."""
    engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    silence(thread).engine = engine
    decoder = thread.__dict__.get("decoder")
    if isinstance(decoder, said.Decoder):
        decoder.asked.rank = engine, req_meta["remote_host"], port
        # Under context parallel a decode rank may read several times from one prefill rank.
        first = next(iter(flat(req_meta["local_block_ids"])), "")
        decoder.asked.pull = f"{req_meta.get('shard_idx', req_meta.get('offset', ''))}.{first}"
    bound(thread)


def bound(thread: Any) -> None:
    """Of engines that requests name a receiving thread remembers so many, and itself.

    The release forgets the oldest of 16000, which is its own: after so many names in requests it
    can pull nothing any more.
    """
    for name in CACHES:
        known = thread.__dict__.get(name, {})
        while len(known) > MAX_ENGINES:
            own = getattr(thread, "local_engine_id", None)
            del known[next(engine for engine in known if engine != own)]


def forget(thread: Any, engine: str, port: int) -> None:
    """What is known of a prefill rank."""
    for name in CACHES:
        known = getattr(thread, name)
        if engine in known:
            known[engine].pop(port, None)


def ready(thread: Any, req_meta: dict[str, Any], *, planned: bool) -> None:
    """Whether a prefill rank is known, is the one that the request names, and has its blocks.

    Args:
        planned: The pull is by a plan, which says what is read.

    Raises:
        HandshakeError: It is another server.
        LimitError: The request names blocks that it has not, or it holds other layers.
    """
    decoder = thread.__dict__.get("decoder")
    if not isinstance(decoder, said.Decoder):
        return
    own, theirs = (list(flat(req_meta[f"{one}_block_ids"])) for one in ("local", "remote"))
    if len(own) > len(theirs):
        raise limits.LimitError(
            f"{len(own)} blocks are wanted, and the request names {len(theirs)} of prefill"
        )
    engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    host = req_meta["remote_host"]
    known = decoder.known.get((engine, port))
    cached = port in thread.kv_caches_base_addr.get(engine, ())
    # Another request may have named another machine for the same engine.
    if known is None or known.host != host or not cached:
        forget(thread, engine, port)
        thread._get_remote_metadata(host, port)
        known = decoder.known.get((engine, port))
    if known is None:
        raise kv_handshake.HandshakeError(f"the server at {host}:{port} is not {engine}")
    limits.reads(known, theirs, engine)
    needed = None if planned else _regions(thread, req_meta)
    if needed is not None and known.regions[0] < needed:
        raise limits.LimitError(
            f"the prefill rank at {host}:{port} has {known.regions[0]} caches where {needed} are "
            "read: the two servers do not hold the same layers"
        )


def _regions(thread: Any, req_meta: dict[str, Any]) -> int | None:
    """How many caches of a prefill rank a pull reads; None where the release says it itself.

    A draft model's are not counted: prefill may have none.
    """
    layers = getattr(thread, "pp_layer_indices", None)
    each = len(next(iter(thread.kv_caches.values())))
    if layers is None:
        return each * len(thread.kv_caches)
    if "tp_num_need_pulls" not in req_meta:
        return None
    first, end = layers[req_meta["offset"] // req_meta["tp_num_need_pulls"]]
    return int(max(0, min(end, len(thread.kv_caches)) - first) * each)


def flat(blocks: Iterable[Any]) -> Iterable[int]:
    """Ids of blocks, where there may be a list for each kind of cache."""
    for one in blocks:
        if isinstance(one, list | tuple):
            yield from one
        else:
            yield one


def check_held(thread: Any, req_meta: dict[str, Any]) -> None:
    """Whether what was read was the request's to the end; a rank without the shim cannot say.

    Raises:
        LookupError: It may have been another's.
    """
    decoder = thread.__dict__.get("decoder")
    rank = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    known = decoder.known.get(rank) if isinstance(decoder, said.Decoder) else None
    if known is not None and known.answers:
        request = req_meta.get("remote_request_id", req_meta["request_id"])
        held.check(thread, request, known.host, rank[1])

"""vllm-ascend's MooncakeConnectorV1: what its ranks say, and how they wait for it."""

from __future__ import annotations

import importlib
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_handshake
from ascend_patch.kernels.kv_layout import Side

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SILENCE = "ascend_patch_silence"
LEAST_S, MOST_S = 5.0, 60.0
LATER_MS = 60_000
# Beside the fields of kv_handshake: decode.tp_size of a prefill server's own configuration.
SAID_DECODE_TP = "decode_tp"


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
    # A rank that was only stopped for a while hears of it, and frees the blocks.
    socket.setsockopt(zmq.LINGER, LATER_MS)
    socket.connect(host.make_zmq_path("tcp", remote_host, remote_handshake_port))
    message = (host.DONE_RECVING_MSG, request_id, *remote_port_send_num)
    socket.send(thread.encoder.encode(message))
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


def sending_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheSendingThread.__init__: a prefill rank says what it is, to whom it may concern."""
    wrapped(*args, **kwargs)
    _tell(instance, *args, **kwargs)


def _tell(thread: Any, vllm_config: Any, *_: Any, **__: Any) -> None:
    parallel = vllm_config.parallel_config
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    side = checks.side_of(vllm_config, thread.kv_caches, tp=tp, pp=pp)
    if side is None:
        return
    known = {name: getattr(thread.metadata, name) for name in thread.metadata.__struct_fields__}
    said = kv_handshake.say(side, str(vllm_config.model_config.model))
    decode = vllm_config.kv_transfer_config.get_from_extra_config("decode", {})
    said[SAID_DECODE_TP] = decode.get("tp_size")
    thread.metadata = _with_field(type(thread.metadata))(**known, **{kv_handshake.FIELD: said})


def _with_field(kind: Any) -> Any:
    """MooncakeAgentMetadata with our field, which an unpatched peer does not read."""
    import msgspec

    field = (kv_handshake.FIELD, dict[str, Any] | None, None)
    return msgspec.defstruct("Told", [field], bases=(kind,), omit_defaults=True)


class Decoder:
    """The decoder of a prefill rank's metadata, which refuses one that does not fit.

    Attributes:
        told: What prefill servers with the shim said, by engine: their side, and decode.tp_size of
            their configuration.
    """

    def __init__(
        self,
        thread_class: type,
        side: Side,
        *,
        assumed_tp: int | None,
        assumed_pp: int,
        any_blocks: bool = False,
    ) -> None:
        import msgspec

        host = importlib.import_module(thread_class.__module__)
        self._decoder = msgspec.msgpack.Decoder(_with_field(host.MooncakeAgentMetadata))
        self._side, self._assumed = side, (assumed_tp, assumed_pp)
        self._any_blocks = any_blocks
        self.told: dict[str, tuple[Side, int | None]] = {}

    def decode(self, data: bytes) -> Any:
        found = self._decoder.decode(data)
        told = getattr(found, kv_handshake.FIELD)
        self.told.pop(found.engine_id, None)
        if told is not None:
            peer = kv_handshake.hear(told).side
            reason = checks.heard(peer, self._side, *self._assumed, any_blocks=self._any_blocks)
            if reason is not None:
                raise kv_handshake.HandshakeError(reason)
            said = told.get(SAID_DECODE_TP)
            self.told[found.engine_id] = peer, said if isinstance(said, int) else None
        return found

"""vllm-ascend's MooncakeConnectorV1: what a prefill rank says of itself, told and heard."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl import kv_handshake
from ascend_patch.kernels.kv_layout import Side

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Beside the fields of kv_handshake: decode.tp_size of a prefill server's own configuration.
SAID_DECODE_TP = "decode_tp"
# Prefill ranks of which something is remembered; who is forgotten is asked again.
MAX_KNOWN = 4096


def sending_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheSendingThread.__init__: a prefill rank says what it is, to whom it may concern."""
    wrapped(*args, **kwargs)
    _tell(instance, *args, **kwargs)


def _tell(thread: Any, vllm_config: Any, *_: Any, **__: Any) -> None:
    parallel = vllm_config.parallel_config
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    side = checks.side_of(vllm_config, thread.kv_caches, tp=tp, pp=pp)
    if side is None:
        tell(thread, None)
        return
    said = kv_handshake.say(side, str(vllm_config.model_config.model))
    decode = vllm_config.kv_transfer_config.get_from_extra_config("decode", {})
    said[SAID_DECODE_TP] = decode.get("tp_size")
    tell(thread, said)


def tell(thread: Any, said: dict[str, Any] | None) -> None:
    """What a prefill rank says of itself from now on; also that it can be asked."""
    known = {name: getattr(thread.metadata, name) for name in thread.metadata.__struct_fields__}
    more = {kv_handshake.FIELD: said, held.ANSWERS: 1}
    thread.metadata = _with_fields(type(thread.metadata))(**known, **more)


def _with_fields(kind: Any) -> Any:
    """MooncakeAgentMetadata with our fields, which an unpatched peer does not read."""
    fields = [(kv_handshake.FIELD, dict[str, Any] | None, None), (held.ANSWERS, int, 0)]
    return msgspec.defstruct("Told", fields, bases=(kind,), omit_defaults=True)


def listen(thread: Any, side: Side | None, **assumed: Any) -> None:
    """A receiving thread checks what prefill ranks say, and says who it is."""
    thread.decoder = Decoder(type(thread), side, **assumed)
    thread.encoder = held.Encoder(thread.encoder, thread)


class Decoder:
    """The decoder of a prefill rank's metadata, which refuses one that cannot be or does not fit.

    Attributes:
        told: What prefill servers with the shim said, by engine: their side, and decode.tp_size of
            their configuration.
        known: What each rank said, by engine and port.
        asked: Of a thread: the rank that it asks, (engine, host, port).
    """

    def __init__(
        self,
        thread_class: type,
        side: Side | None,
        *,
        assumed_tp: int | None = None,
        assumed_pp: int = 1,
        any_blocks: bool = False,
    ) -> None:
        host = importlib.import_module(thread_class.__module__)
        self._decoder = msgspec.msgpack.Decoder(_with_fields(host.MooncakeAgentMetadata))
        self._side, self._assumed = side, (assumed_tp, assumed_pp)
        self._any_blocks = any_blocks
        self.told: OrderedDict[str, tuple[Side, int | None]] = OrderedDict()
        self.known: OrderedDict[tuple[str, int], limits.Metadata] = OrderedDict()
        self.asked = threading.local()

    def decode(self, data: bytes) -> Any:
        """As msgspec's.

        Raises:
            LimitError: A number or an address cannot be.
            HandshakeError: It is another server than the one that was asked, or does not fit.
        """
        found = self._decoder.decode(data)
        engine, host, port = getattr(self.asked, "rank", (None, "", 0))
        known = limits.metadata(found, host, answers=getattr(found, held.ANSWERS))
        if engine not in (None, found.engine_id):
            raise kv_handshake.HandshakeError(
                f"the server at {host}:{port} is {found.engine_id}, and the request names {engine}:"
                " it was started again, or the request's kv_transfer_params are of another server"
            )
        self._hear(found.engine_id, getattr(found, kv_handshake.FIELD))
        _remember(self.known, (found.engine_id, port), known)
        return found

    def _hear(self, engine: str, told: dict[str, Any] | None) -> None:
        self.told.pop(engine, None)
        if told is None or self._side is None:
            return
        peer = kv_handshake.hear(told).side
        reason = checks.heard(peer, self._side, *self._assumed, any_blocks=self._any_blocks)
        if reason is not None:
            raise kv_handshake.HandshakeError(reason)
        said = told.get(SAID_DECODE_TP)
        _remember(self.told, engine, (peer, said if type(said) is int else None))


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    known.pop(key, None)
    known[key] = value
    while len(known) > MAX_KNOWN:
        known.popitem(last=False)

"""vLLM's Mooncake connector, 0.16 to 0.18: any prefill TP to any decode TP, failing closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import zmq

from ascend_patch.impl import (
    kv_handshake,
    kv_limits,
    kv_settings,
    kv_vllm_bootstrap,
    kv_vllm_caches,
    kv_vllm_engine,
    kv_vllm_process,
    kv_vllm_wire,
)
from ascend_patch.impl.kv_vllm_listen import Listener, ListenError, cannot_listen
from ascend_patch.impl.kv_vllm_receive import Receiver
from ascend_patch.impl.kv_vllm_send import Sender
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

SENDER, RECEIVER, SETTINGS, WRITER = (
    f"ascend_patch_{one}" for one in ("sender", "receiver", "settings", "writer")
)
READY_S = 120.0


def worker_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.__init__: read our settings, and understand our field."""
    settings = _settings(*args, **kwargs)
    with kv_vllm_engine.all_cores():
        wrapped(*args, **kwargs)
    setattr(instance, SETTINGS, settings)
    instance._xfer_meta_decoder = kv_vllm_wire.ask_decoder()
    # A pull has two sockets for each prefill rank, and ZMQ makes 1023 of them if nobody asks.
    instance.async_zmq_ctx.set(zmq.MAX_SOCKETS, instance.async_zmq_ctx.get(zmq.SOCKET_LIMIT))


def _settings(vllm_config: Any, engine_id: str) -> kv_settings.Settings:
    from vllm import envs

    return kv_settings.read(vllm_config, engine_id, envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT)


def register_kv_caches(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.register_kv_caches, for caches of any layout."""
    _register(instance, *args, **kwargs)


def _register(worker: Any, kv_caches: dict[str, Any]) -> None:
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backend

    backend = get_current_attn_backend(worker.vllm_config)
    split = worker.kv_topo.split_k_and_v
    caches = kv_vllm_caches.read(
        kv_caches,
        backend.get_kv_cache_shape,
        block_size=worker.block_size,
        mla=worker.use_mla,
        split=split,
    )
    side = caches.side(
        total_kv_heads=worker.model_config.get_total_num_kv_heads(),
        tp=worker.tp_size,
        mla=worker.use_mla,
        block_size=worker.block_size,
    )
    addresses = [region.address for region in caches.regions]
    lengths = [region.nbytes for region in caches.regions]
    if worker.engine.batch_register_memory(addresses, lengths) != 0:
        raise RuntimeError(
            f"Mooncake's transfer engine cannot register {len(addresses)} regions of "
            f"{lengths[0]} bytes of KV cache; its own lines above say why."
        )
    worker.kv_caches_base_addr = addresses
    worker.num_blocks, worker.block_len = caches.num_blocks, caches.block_bytes
    worker.device_kv_caches = kv_caches
    model = str(worker.model_config.model)
    settings = getattr(worker, SETTINGS)
    log.info(
        "kv connector: rank %d of TP %d, %d regions of %d blocks of %d tokens, %s%s, %s",
        worker.tp_rank,
        worker.tp_size,
        len(addresses),
        caches.num_blocks,
        worker.block_size,
        caches.layout,
        " (K and V in one)" if caches.combined else "",
        caches.dtype,
    )
    views = [region.view for region in caches.regions]
    if not worker.is_kv_producer:
        receiver = Receiver(worker, side, model, views=views, **settings._asdict())
        setattr(worker, RECEIVER, receiver)
    if not worker.is_kv_consumer:
        _listen(worker, side, model, views)


def _listen(worker: Any, side: Any, model: str, views: list[Any]) -> None:
    """Start the side channel, and wait until it is there: the host would wait for ever."""
    from vllm import envs
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import mooncake_connector

    def new_request(transfer: str) -> Any:
        return mooncake_connector.SendBlockMeta(
            p_req_id="", transfer_id=transfer, local_block_ids=[], ready=asyncio.Event()
        )

    timeout = float(envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT)
    sender = Sender(worker, side, model, timeout=timeout, new_request=new_request, views=views)
    try:
        sender.said[kv_vllm_wire.PROCESS_PORT] = kv_vllm_process.port(worker.hostname)
    except OSError as refused:
        raise cannot_listen(worker, refused) from refused
    setattr(worker, SENDER, sender)
    ready = threading.Event()
    listening = asyncio.run_coroutine_threadsafe(Listener(worker).run(ready), worker.sender_loop)
    deadline = time.monotonic() + READY_S
    while not ready.wait(0.2):
        if listening.done():
            error = listening.exception()
            if isinstance(error, ListenError):
                raise error
            raise RuntimeError(
                f"The Mooncake connector's rank {worker.tp_rank} cannot register with the "
                "bootstrap server; is VLLM_MOONCAKE_BOOTSTRAP_PORT another server's?"
            ) from error
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"The Mooncake connector's rank {worker.tp_rank} found no bootstrap server within "
                f"{READY_S:.0f} s; it should run on the first rank of the prefill server."
            )


def send_kv_to_decode(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Awaitable[None]:
    """MooncakeConnectorWorker.send_kv_to_decode: ours for patched decode ranks."""
    return _answer(wrapped, instance, *args, **kwargs)


async def _answer(wrapped: Wrapped, worker: Any, identity: bytes, sock: Any, meta: Any) -> None:
    if meta.ascend_patch is not None:
        await getattr(worker, SENDER).handle(identity, sock, meta)
    elif meta.remote_tp_size == worker.tp_size and meta.remote_hostname:
        _check_unpatched(worker, meta)
        await wrapped(identity, sock, meta)
    else:
        # What an answer is made of, and the decode server logs.
        ratio = f"prefill TP {worker.tp_size} -> decode TP {meta.remote_tp_size}"
        raise kv_limits.LimitError(kv_handshake.both_sides(ratio, "decode"))


def _check_unpatched(worker: Any, meta: Any) -> None:
    """What the host would take as it comes.

    Raises:
        LimitError: It is out of range.
    """
    kv_limits.host_name("remote_hostname", meta.remote_hostname)
    kv_limits.port("remote_port", meta.remote_port)
    kv_limits.rank("remote_tp_rank", meta.remote_tp_rank, worker.tp_size)
    kv_limits.whole("the number of requests", len(meta.req_blocks), 0, kv_limits.MAX_REQUESTS)
    for request, (transfer, blocks) in meta.req_blocks.items():
        kv_limits.text("the request id", request)
        kv_limits.text("the transfer id", transfer)
        kv_limits.block_ids("the list of blocks", blocks)
    # How many blocks the decode rank has is not said; one is certain.
    sizes = [worker.block_len] * len(worker.kv_caches_base_addr)
    kv_limits.addresses("kv_caches_base_addr", meta.kv_caches_base_addr, sizes)


def send_blocks(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> int:
    """MooncakeConnectorWorker._send_blocks: over TCP range by range, see `kv_vllm_engine`."""
    extra = instance.vllm_config.kv_transfer_config.kv_connector_extra_config
    if not kv_vllm_engine.fits(instance.engine, extra.get("mooncake_protocol", "rdma")):
        code: int = wrapped(*args, **kwargs)
        return code
    writer = instance.__dict__.setdefault(WRITER, kv_vllm_engine.Writer(instance.engine))
    return _write(writer, *args, **kwargs)


def _write(
    writer: kv_vllm_engine.Writer,
    remote_session: str,
    src_ptrs: list[int],
    dst_ptrs: list[int],
    lengths: list[int],
) -> int:
    return writer.write(remote_session, src_ptrs, dst_ptrs, lengths)


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Awaitable[None]:
    """MooncakeConnectorWorker._start_load_kv: all pulls are ours."""
    pulls: Awaitable[None] = getattr(instance, RECEIVER).start(*args, **kwargs)
    return pulls


def record_send_reqs(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Awaitable[None]:
    """MooncakeConnectorWorker.record_send_reqs: also for requests that decode asked for first."""
    return _record(instance, *args, **kwargs)


async def _record(worker: Any, metadata: Any) -> None:
    from vllm import envs

    sender = getattr(worker, SENDER)
    requests = worker.reqs_need_send
    for request, (transfer, blocks) in metadata.reqs_to_send.items():
        send = requests.get(transfer)
        if send is None:
            send = requests[transfer] = sender.new_request(transfer)
        send.p_req_id = request
        sender.know(transfer)
        if blocks:
            send.local_block_ids = blocks
            send.expire_time = time.perf_counter() + envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT
            send.ready.set()
            sender.settle(transfer)
    for transfer in metadata.reqs_not_processed:
        sender.abort(transfer, "the prefill server ended the request with nothing to send")
        send = requests.pop(transfer, None)
        if send is not None:
            send.ready.set()


def load_errors(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[int]:
    """KVConnectorBase_V1.get_block_ids_with_load_errors, which Mooncake's class does not have."""
    worker = getattr(instance, "connector_worker", None)
    receiver = getattr(worker, RECEIVER, None)
    found: set[int] = wrapped(*args, **kwargs)
    if receiver is None:
        return found
    if isinstance(receiver, Receiver):
        receiver.rest()
    lost: set[int] = receiver.take_invalid()
    return found | lost


def bootstrap_start(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeBootstrapServer.start: see `kv_vllm_bootstrap`."""
    kv_vllm_bootstrap.start(wrapped, instance, *args, **kwargs)

"""vllm-ascend's MooncakeConnectorV1, 0.13 and 0.18: checked before it pulls, failing closed.

The release logs a pull that fails and calls it done; what the blocks held before is then taken for
the prompt. Here its request ends with its blocks reported, and vLLM computes it again or fails it.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_handshake
from ascend_patch.impl.kv_vllm import DEFAULT_RETRIES, RETRIES, TIMEOUT
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DEFAULT_TIMEOUT_S = 60.0
# The engine's answer is raised before anything is laid out anew, so that pulling again is safe.
ENGINE_FAILED = "Mooncake transfer failed"
SIDE = "ascend_patch_side"


def transfer_kv_cache(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._transfer_kv_cache: again where that may help, and a failure is kept."""
    _transfer(wrapped, instance, *args, **kwargs)


def _transfer(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any]) -> None:
    request, blocks = req_meta["request_id"], req_meta["local_block_ids"]
    state = failures.of(thread)
    if state.failed(request):
        return  # it is computed again, or fails: what follows here tells prefill that it is done
    extra = thread.vllm_config.kv_transfer_config.kv_connector_extra_config
    left = int(extra.get(RETRIES, DEFAULT_RETRIES))
    deadline = time.monotonic() + float(extra.get(TIMEOUT, DEFAULT_TIMEOUT_S))
    while True:
        try:
            wrapped(req_meta)
        except Exception as error:
            _forget(thread, req_meta)
            again = ENGINE_FAILED in str(error) and left > 0 and time.monotonic() < deadline
            log.error(
                "kv pull of request %s by decode rank %d of TP %d, pull %d, from %s at %s:%d: "
                "%s; %s",
                request,
                thread.tp_rank,
                thread.tp_size,
                req_meta["offset"],
                req_meta["remote_engine_id"],
                req_meta["remote_host"],
                req_meta["remote_handshake_port"],
                error,
                f"pulling again ({left} left)" if again else f"{len(blocks)} blocks are invalid",
            )
            if not again:
                state.add(request, blocks)
                raise
            left -= 1
        else:
            return


def _forget(thread: Any, req_meta: dict[str, Any]) -> None:
    """What is known of a prefill rank: it may be another process by now."""
    engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    for known in (thread.kv_caches_base_addr, thread.remote_te_port):
        known[engine].pop(port, None)


def finished_recving(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[str]:
    """KVCacheRecvingThread.get_and_clear_finished_requests: failed ones with their blocks."""
    return failures.of(instance).release(wrapped(*args, **kwargs))


def get_remote_metadata(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._get_remote_metadata: sockets that wait for an answer are not kept.

    The release puts one back that had none; every later message on it fails.
    """
    try:
        wrapped(*args, **kwargs)
    except Exception:
        _close(instance, *args, **kwargs)
        raise


def _close(thread: Any, remote_host: str, remote_handshake_port: int) -> None:
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
    return wrapped(*bound.args, **bound.kwargs)


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
    thread.metadata = _with_field(type(thread.metadata))(**known, **{kv_handshake.FIELD: said})


def _with_field(kind: Any) -> Any:
    """MooncakeAgentMetadata with our field, which an unpatched peer does not read."""
    import msgspec

    field = (kv_handshake.FIELD, dict[str, Any] | None, None)
    return msgspec.defstruct("Told", [field], bases=(kind,), omit_defaults=True)


def register_kv_caches(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.register_kv_caches: what a prefill rank says is heard."""
    wrapped(*args, **kwargs)
    thread = instance.kv_recv_thread
    if thread is None:
        return
    failures.of(thread)
    side = None
    if not getattr(instance, "_is_hma_required", False):
        caches = instance.kv_caches
        side = checks.side_of(instance.vllm_config, caches, tp=instance.tp_size, pp=1)
    setattr(instance, SIDE, side)
    if side is not None:
        # From 0.18 a request brings its prefill server's size.
        assumed = None if _takes_size(instance) else instance._prefill_tp_size
        thread.decoder = _Decoder(type(thread), side, assumed)


class _Decoder:
    """The decoder of a prefill rank's metadata, which refuses one that does not fit."""

    def __init__(self, thread_class: type, side: Any, assumed_tp: int | None) -> None:
        import msgspec

        host = importlib.import_module(thread_class.__module__)
        self._decoder = msgspec.msgpack.Decoder(_with_field(host.MooncakeAgentMetadata))
        self._side, self._assumed = side, assumed_tp

    def decode(self, data: bytes) -> Any:
        found = self._decoder.decode(data)
        told = getattr(found, kv_handshake.FIELD)
        reason = None if told is None else checks.heard(told, self._side, self._assumed)
        if reason is not None:
            raise kv_handshake.HandshakeError(reason)
        return found


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.start_load_kv: without the requests that cannot be pulled."""
    _start(wrapped, instance, *args, **kwargs)


def _start(wrapped: Wrapped, worker: Any, metadata: Any) -> None:
    thread = worker.kv_recv_thread
    if thread is not None:
        # The release notes them after it queued their pulls; one that ends sooner never ends.
        for request in metadata.reqs_in_batch:
            thread.task_tracker.add_req_to_process(request)
        if worker.kv_send_thread is None:
            metadata.reqs_in_batch = set()
        for request, meta in list(metadata.requests.items()):
            refused = _refused(worker, request, meta)
            if refused is not None:
                del metadata.requests[request]
                _decline(worker, request, meta, *refused)
    wrapped(metadata)


def _takes_size(worker: Any) -> bool:
    return hasattr(worker, "_get_tp_num_need_pulls")


def _refused(worker: Any, request: str, meta: Any) -> tuple[str, list[int]] | None:
    """Why a request is not pulled, and the prefill ranks that wait for this decode rank."""
    decode = getattr(worker, SIDE, None)
    if decode is None or meta.remote_pcp_size * meta.remote_dcp_size > 1:
        return None
    if _takes_size(worker):
        tp = meta.remote_ptp_size or worker._prefill_tp_size
        pulls = worker._get_tp_num_need_pulls(tp)
        choice: tuple[Any, ...] = (meta.remote_request_id, tp)
    else:
        tp, pulls, choice = worker._prefill_tp_size, worker.tp_num_need_pulls, (request,)
    partition = worker._prefill_pp_layer_partition
    prefill = checks.peer_side(decode, tp=tp, pp=worker._prefill_pp_size, partition=partition)
    try:
        chosen = worker._get_remote_ranks_for_req(*choice)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = checks.wrong_ranks(prefill, decode, [], worker.tp_rank, pulls)
        return f"{reason or ''} (the release chooses no ranks: {error})".strip(), []
    reason = checks.wrong_ranks(prefill, decode, chosen, worker.tp_rank, pulls)
    if reason is None:
        return None
    return reason, chosen[worker.tp_rank] if worker.tp_rank < len(chosen) else []


def _decline(worker: Any, request: str, meta: Any, reason: str, ranks: list[int]) -> None:
    """Nothing is read, the blocks are invalid, and those that wait for this rank may free them."""
    log.error(
        "kv pull of request %s by decode rank %d from %s (%s:%d): not begun: %s",
        request,
        worker.tp_rank,
        meta.remote_engine_id,
        meta.remote_host,
        meta.remote_port,
        reason,
    )
    thread = worker.kv_recv_thread
    # On releases/v0.18.0 a list for each kind of cache; here there is one.
    ids = meta.local_block_ids
    blocks = ids[0] if isinstance(ids, tuple) else ids
    failures.of(thread).add(request, blocks, settle_s=0.0)
    if not ranks:
        thread.task_tracker.update_done_task_count(request)
    for number, rank in enumerate(ranks):
        port = meta.remote_port + rank
        host, engine = worker._get_remote_host_info_by_port(
            meta.remote_port,
            port,
            meta.remote_host,
            meta.remote_engine_id,
            meta.remote_multi_nodes_meta_mapping,
        )
        named = {"remote_request_id": meta.remote_request_id} if _takes_size(worker) else {}
        thread.add_request(
            request_id=request,
            local_block_ids=[],
            remote_block_ids=[],
            remote_engine_id=engine,
            remote_host=host,
            remote_handshake_port=port,
            offset=number,
            tp_num_need_pulls=max(1, len(ranks)),
            all_task_done=number == len(ranks) - 1,
            **named,
        )


def load_errors(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[int]:
    """KVConnectorBase_V1.get_block_ids_with_load_errors, which the release's class has not."""
    found: set[int] = wrapped(*args, **kwargs)
    worker = getattr(instance, "connector_worker", None)
    thread = getattr(worker, "kv_recv_thread", None)
    state = getattr(thread, failures.NAME, None)
    return found if state is None else found | state.take_invalid()


def sample_tokens(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """NPUModelRunner.sample_tokens of 0.13: what was not loaded goes with what was.

    The release asks its connector what has finished, and not what failed.
    """
    output = instance.kv_connector_output
    if output is not None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if has_kv_transfer_group():
            output.invalid_block_ids |= get_kv_transfer_group().get_block_ids_with_load_errors()
    return wrapped(*args, **kwargs)

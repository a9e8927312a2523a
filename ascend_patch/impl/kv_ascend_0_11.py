"""vllm-ascend 0.11.0's MooncakeConnectorV1: checked before it pulls, failing closed.

vLLM 0.11.0 has no blocks that were not loaded: a request whose pull failed answers from whatever
they held. Here it is said with its end that it failed, and the scheduler gives its blocks back and
computes the prompt itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend, kv_settings
from ascend_patch.impl import kv_ascend_admit as admit
from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_listener as listeners
from ascend_patch.impl import kv_ascend_peers as peers
from ascend_patch.impl import kv_ascend_said as said
from ascend_patch.impl import kv_ascend_start as starts
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

FAILED = "ascend_patch_failed"
# Requests of this worker that have ended without their blocks.
_ended: set[str] = set()
_lock = threading.Lock()


class Finished(set[str]):
    """Requests that were received, on their way to the scheduler; of some that is not true."""

    failed: frozenset[str] = frozenset()


def _marked(requests: Any, failed: set[str]) -> Finished:
    found = Finished(requests or ())
    found.failed = frozenset(failed)
    return found


def sending_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheSendingThread.__init__: a prefill rank says that it can be asked."""
    wrapped(*args, **kwargs)
    said.tell(instance, None)


def send_done_recv_signal(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._send_done_recv_signal: without an answer a request ends as well.

    The release raises, and never notes that the pull has ended.
    """
    _done(wrapped, instance, *args, **kwargs)


def _done(wrapped: Wrapped, thread: Any, request_id: str, host: str, port: int) -> None:
    try:
        peers.done(wrapped, thread, request_id, host, port)
    except Exception as error:
        log.warning(
            "kv pull of request %s: %s:%d was not told of its end: %s",
            request_id,
            host,
            port,
            error,
        )
        peers.close(thread, host, port)


def finished_recving(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[str]:
    """KVCacheRecvingThread.get_and_clear_finished_requests: those that failed are noted."""
    state = failures.of(instance)
    finished = state.release(wrapped(*args, **kwargs))
    with _lock:
        _ended.update(state.take_ended())
    kept.forget(instance, finished)
    return finished


def get_finished_kv_transfer(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """NPUModelRunner.get_finished_kv_transfer: the scheduler is told which of them failed."""
    sent, received = wrapped(*args, **kwargs)
    with _lock:
        failed = _ended & set(received or ())
        _ended.difference_update(failed)
    return sent, _marked(received, failed) if failed else received


def aggregate(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """KVOutputAggregator.aggregate: what failed on any worker has failed."""
    return _aggregate(wrapped, instance, *args, **kwargs)


def _aggregate(wrapped: Wrapped, aggregator: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    failed = aggregator.__dict__.setdefault(FAILED, set())
    for output in outputs:
        said = output.kv_connector_output
        failed.update(getattr(said and said.finished_recving, "failed", ()))
    found = wrapped(outputs, *args, **kwargs)
    whole = found.kv_connector_output
    ended = failed & set(whole.finished_recving or ())
    if ended:
        whole.finished_recving = _marked(whole.finished_recving, ended)
        failed -= ended
    return found


def update_from_kv_xfer_finished(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Scheduler._update_from_kv_xfer_finished: note what failed."""
    _note(instance, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _note(scheduler: Any, kv_connector_output: Any) -> None:
    received = kv_connector_output.finished_recving
    failed = set(getattr(received, "failed", ()))
    # Of requests that were aborted meanwhile the blocks are free now.
    gone = admit.ended(scheduler, received)
    if gone:
        kv_connector_output.finished_recving = _marked(received - gone, failed - gone)
    scheduler.__dict__.setdefault(FAILED, set()).update(failed - gone)


def update_waiting_for_remote_kv(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> bool:
    """Scheduler._update_waiting_for_remote_kv: a request that failed begins again, without pulls.

    Its blocks never enter the prefix cache.
    """
    return _wait(wrapped, instance, *args, **kwargs)


def _wait(wrapped: Wrapped, scheduler: Any, request: Any) -> bool:
    failed, name = scheduler.__dict__.get(FAILED, set()), request.request_id
    if name not in failed or name not in scheduler.finished_recving_kv_req_ids:
        return bool(wrapped(request))
    failed.discard(name)
    scheduler.finished_recving_kv_req_ids.remove(name)
    scheduler.kv_cache_manager.free(request)
    request.num_computed_tokens = 0
    log.error("kv pull of request %s failed; its prompt is computed here", name)
    return True


def register_kv_caches(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.register_kv_caches: what decode's caches are, and its settings.

    Raises:
        ValueError: A setting makes no sense.
    """
    settings = kv_settings.read(
        instance.vllm_config, instance.engine_id, kv_ascend.DEFAULT_TIMEOUT_S
    )
    wrapped(*args, **kwargs)
    listeners.check_started(instance.kv_send_thread)
    thread = instance.kv_recv_thread
    if thread is not None:
        side = checks.side_of(instance.vllm_config, instance.kv_caches, tp=instance.tp_size, pp=1)
        setattr(instance, starts.SIDE, side)
        kv_ascend.prepare(thread, settings)
        said.listen(thread, None)


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.start_load_kv: without the requests that it cannot pull."""
    _start(wrapped, instance, *args, **kwargs)


def _start(wrapped: Wrapped, worker: Any, metadata: Any) -> None:
    thread = worker.kv_recv_thread
    if thread is not None:
        kept.note(thread, metadata.requests)
        full = starts.too_many_kept(thread)
        for request, meta in list(metadata.requests.items()):
            refused = _refused(worker, request)
            if full is not None and meta.local_block_ids:
                refused = full, _ranks(worker, request)
            if refused is not None:
                del metadata.requests[request]
                _decline(thread, request, meta, *refused)
        starts.each(wrapped, metadata, lambda *one: _decline_begun(thread, *one))
    wrapped(metadata)
    held.announced(worker, metadata)


def _decline_begun(thread: Any, request: str, meta: Any, error: Exception) -> None:
    reason = f"the release cannot start it: {type(error).__name__}: {error}"
    _decline(thread, request, meta, reason, [0])


def _ranks(worker: Any, request: str) -> list[int]:
    try:
        return [int(rank) for rank in worker._get_remote_tp_ranks_for_req(request)[worker.tp_rank]]
    except (ValueError, IndexError, ZeroDivisionError):
        return []


def _refused(worker: Any, request: str) -> tuple[str, list[int]] | None:
    """Why a request is not pulled, and the prefill ranks that wait for this decode rank."""
    decode = getattr(worker, starts.SIDE, None)
    if decode is None:
        return None
    prefill = checks.peer_side(decode, tp=worker._prefill_tp_size, pp=1, partition=None)
    return starts.judged(
        lambda: worker._get_remote_tp_ranks_for_req(request),
        prefill,
        decode,
        worker.tp_rank,
        worker.num_need_pulls,
    )


def _decline(thread: Any, request: str, meta: Any, reason: str, ranks: list[int]) -> None:
    starts.log_declined(request, thread.tp_rank, meta, reason)
    failures.of(thread).add(request, meta.local_block_ids, settle_s=0.0)
    if not ranks:
        thread.task_tracker.update_done_task_count(request)
    for number, rank in enumerate(ranks):
        thread.add_request(
            request_id=request,
            local_block_ids=[],
            remote_block_ids=[],
            remote_engine_id=meta.remote_engine_id,
            remote_host=meta.remote_host,
            remote_handshake_port=meta.remote_port + rank,
            offset=number,
            num_need_pulls=len(ranks),
        )

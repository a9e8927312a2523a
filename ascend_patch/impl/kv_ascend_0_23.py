"""vllm-ascend 0.23.0's MooncakeConnectorV1: checked before it pulls.

The release reports blocks that were not loaded itself. It checks no more than the ones before it
which ranks it reads from, and reads what prefill may have given to others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend
from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_listener as listeners
from ascend_patch.impl import kv_ascend_peers as peers
from ascend_patch.impl import kv_ascend_said as said
from ascend_patch.impl import kv_ascend_start as starts

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def register_kv_caches(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.register_kv_caches: what a prefill rank says is heard."""
    wrapped(*args, **kwargs)
    listeners.check_started(instance.kv_send_thread)
    thread = instance.kv_recv_thread
    if thread is None:
        return
    failures.of(thread)
    kv_ascend.watch(thread)
    side = None
    if not instance._is_hma_required:
        side = checks.side_of(instance.vllm_config, instance.kv_caches, tp=instance.tp_size, pp=1)
        setattr(instance, starts.SIDE, side)
    # Of the sizes of blocks the release takes care.
    said.listen(thread, side, assumed_pp=instance._prefill_pp_size, any_blocks=True)


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.start_load_kv: without the requests that it cannot pull."""
    _start(wrapped, instance, *args, **kwargs)


def _start(wrapped: Wrapped, worker: Any, metadata: Any) -> None:
    thread = worker.kv_recv_thread
    if thread is not None:
        kept.note(thread, metadata.requests)
        for request in metadata.reqs_in_batch:
            thread.task_tracker.add_req_to_process(request)
        full = starts.too_many_kept(thread)
        for request, meta in list(metadata.requests.items()):
            try:
                refused = starts.refused(worker, request, meta)
                if full is not None and any(meta.local_block_ids):
                    refused = full, starts.waiting_ranks(worker, request, meta)
            except Exception as error:
                del metadata.requests[request]
                _decline_begun(worker, request, meta, error)
                continue
            if refused is not None:
                del metadata.requests[request]
                _decline(worker, request, meta, *refused)
        starts.each(wrapped, metadata, lambda *one: _decline_begun(worker, *one))
    wrapped(metadata)
    held.announced(worker, metadata)


def _decline_begun(worker: Any, request: str, meta: Any, error: Exception) -> None:
    reason = f"the release cannot start it: {type(error).__name__}: {error}"
    _decline(worker, request, meta, reason, [0])


def _decline(worker: Any, request: str, meta: Any, reason: str, ranks: list[int]) -> None:
    """Nothing is read, the blocks are invalid, and those that wait for this rank may free them."""
    starts.log_declined(request, worker.tp_rank, meta, reason)
    thread = worker.kv_recv_thread
    thread._mark_failed_recv_request(request, meta.local_block_ids)
    if not ranks:
        thread.task_tracker.update_done_task_count(request)
        thread._clear_failed_recv_request(request)
    for number, rank in enumerate(ranks):
        host, engine = starts.address(worker, meta, rank)
        thread.add_request(
            request_id=request,
            remote_request_id=meta.remote_request_id,
            local_block_ids=([],),
            remote_block_ids=([],),
            group_pulls=[],
            remote_engine_id=engine,
            remote_host=host,
            remote_handshake_port=meta.remote_port + rank,
            all_task_done=number == len(ranks) - 1,
        )


def transfer_kv_cache_all_groups(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> None:
    """KVCacheRecvingThread._transfer_kv_cache_all_groups: only while prefill keeps the blocks."""
    _transfer(wrapped, instance, *args, **kwargs)


def _transfer(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any]) -> None:
    request, wanted = req_meta["request_id"], any(req_meta["local_block_ids"])
    peers.asking(thread, req_meta)
    try:
        if wanted:
            kept.check(thread, request)
            peers.ready(thread, req_meta, planned=False)
        wrapped(req_meta)
        if wanted:
            kept.check(thread, request)
            peers.check_held(thread, req_meta)
    except Exception as error:
        # The release reports the blocks itself; the request ends when nothing writes to them.
        blocks = list(peers.flat(req_meta["local_block_ids"]))
        kv_ascend.note_failed(thread, req_meta, blocks, error, settle_s=0.0)
        raise


def finished_recving(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[str]:
    """KVCacheRecvingThread.get_and_clear_finished_requests: what has ended is forgotten.

    A request whose read was given up has not while that may write.
    """
    state = failures.of(instance)
    finished = state.release(wrapped(*args, **kwargs))
    state.take_invalid()
    kept.forget(instance, finished)
    return finished

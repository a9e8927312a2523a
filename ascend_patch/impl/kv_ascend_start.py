"""vllm-ascend's MooncakeConnectorV1: the pulls of a request, or why there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_sizes as sizes
from ascend_patch.impl import kv_ascend_split as split
from ascend_patch.impl import kv_settings
from ascend_patch.impl.kv_vllm_wire import log
from ascend_patch.kernels.kv_layout import Plan, Refusal, Side

SIDE = "ascend_patch_side"
# Of a receiving thread: kv_settings.Settings.
SETTINGS = "ascend_patch_settings"


def start(worker: Any, metadata: Any) -> None:
    """Begin what the release does not: planned pulls are queued, wrong ones declined.

    Those requests are taken out of ``metadata``.
    """
    thread = worker.kv_recv_thread
    # The release notes them after it queued their pulls; one that ends sooner never ends.
    for request in metadata.reqs_in_batch:
        thread.task_tracker.add_req_to_process(request)
    if worker.kv_send_thread is None:
        metadata.reqs_in_batch = set()
    kept.note(thread, metadata.requests)
    full = too_many_kept(thread)
    for request, meta in list(metadata.requests.items()):
        if full is not None and _first(meta.local_block_ids):
            del metadata.requests[request]
            _decline(worker, request, meta, full, waiting_ranks(worker, request, meta))
            continue
        try:
            if _prefill_tp(worker, meta) < worker.tp_size:
                del metadata.requests[request]
                _split(worker, request, meta)
                continue
            wrong = refused(worker, request, meta)
        except Exception as error:
            metadata.requests.pop(request, None)
            decline_begun(worker, request, meta, error)
            continue
        if wrong is not None:
            del metadata.requests[request]
            _decline(worker, request, meta, *wrong)


def each(
    wrapped: Callable[[Any], Any], metadata: Any, decline: Callable[[str, Any, Exception], None]
) -> None:
    """The release's own start of each request, one at a time.

    What it raises would end the worker, and the engine with it, for the sake of one request.
    """
    requests, metadata.requests = metadata.requests, {}
    for request, meta in requests.items():
        one = type(metadata)()
        one.requests[request] = meta
        try:
            wrapped(one)
        except Exception as error:
            decline(request, meta, error)


def decline_begun(worker: Any, request: str, meta: Any, error: Exception) -> None:
    """The release may have queued some of its pulls: its end is queued behind them."""
    reason = f"the release cannot start it: {type(error).__name__}: {error}"
    _decline(worker, request, meta, reason, [0])


def most_kept(thread: Any) -> int:
    """How many blocks may be kept for prefill ranks that may write to them still."""
    blocks = next(iter(thread.kv_caches.values()))[0].shape[0]
    settings = getattr(thread, SETTINGS, None)
    share = kv_settings.DEFAULT_QUARANTINE if settings is None else settings.quarantine
    return max(1, int(share * blocks))


def too_many_kept(thread: Any) -> str | None:
    """Why nothing more is pulled; None while it is."""
    requests, blocks = failures.of(thread).kept()
    most = most_kept(thread)
    if blocks < most:
        return None
    return (
        f"{blocks} blocks of {requests} requests are kept, whose prefill ranks stopped in the "
        f"middle of a read and may go on with it, and above {most} nothing more is pulled; start "
        "those ranks again, or this server, or raise quarantine_share"
    )


def waiting_ranks(worker: Any, request: str, meta: Any) -> list[int]:
    """The prefill ranks that wait for this decode rank; none where that cannot be said."""
    tp = _prefill_tp(worker, meta)
    if tp < worker.tp_size:
        return list(range(worker.tp_rank, tp * worker._prefill_pp_size, worker.tp_size))
    choice = (meta.remote_request_id, tp) if takes_size(worker) else (request,)
    try:
        return [int(rank) for rank in worker._get_remote_ranks_for_req(*choice)[worker.tp_rank]]
    except (ValueError, IndexError, ZeroDivisionError):
        return []


def takes_size(worker: Any) -> bool:
    """Whether a request brings its prefill server's size (from 0.18)."""
    return hasattr(worker, "_get_tp_num_need_pulls")


def _prefill_tp(worker: Any, meta: Any) -> int:
    return int(getattr(meta, "remote_ptp_size", None) or worker._prefill_tp_size)


def _prefill_side(worker: Any, meta: Any) -> Any:
    partition = worker._prefill_pp_layer_partition
    tp, pp = _prefill_tp(worker, meta), worker._prefill_pp_size
    return checks.peer_side(getattr(worker, SIDE), tp=tp, pp=pp, partition=partition)


def _split(worker: Any, request: str, meta: Any) -> None:
    """A request of a prefill server with fewer ranks: the pulls of this rank, by the plan."""
    found = _plan(worker, request, meta)
    if isinstance(found, str):
        # Each decode rank comes to the same; together they tell each prefill rank once.
        world = _prefill_tp(worker, meta) * worker._prefill_pp_size
        told = range(worker.tp_rank, world, worker.tp_size)
        _decline(worker, request, meta, found, list(told))
        return
    state, ranks = getattr(worker.kv_recv_thread, split.NAME), found.sources(worker.tp_rank)
    for rank in ranks:
        state.pulls[request, meta.remote_port + rank] = found, rank
    counts = {
        meta.remote_port + rank: {"num": count, "host": address(worker, meta, rank)[0]}
        for rank, count in enumerate(split.readers(found))
    }
    _queue(worker, request, meta, list(ranks), pulls=1, remote_port_send_num=counts)


def _plan(worker: Any, request: str, meta: Any) -> Plan | str:
    cut = hasattr(worker.kv_recv_thread, split.NAME)
    if not cut or meta.remote_pcp_size * meta.remote_dcp_size > 1:
        return sizes.unequal(
            _prefill_tp(worker, meta),
            worker.tp_size,
            "quantised caches, several kinds of cache, and caches under context parallel are not "
            "moved to more ranks",
        )
    remote = meta.remote_request_id if takes_size(worker) else request
    turn = sys.modules[type(worker).__module__].string_to_int64_hash(remote)
    found = split.planned(_prefill_side(worker, meta), getattr(worker, SIDE), turn)
    return found.sentence if isinstance(found, Refusal) else found


def refused(worker: Any, request: str, meta: Any) -> tuple[str, list[int]] | None:
    """Why a request is not pulled, and the prefill ranks that wait for this decode rank."""
    decode = getattr(worker, SIDE, None)
    if decode is None or meta.remote_pcp_size * meta.remote_dcp_size > 1:
        return None
    tp = _prefill_tp(worker, meta)
    if takes_size(worker):
        pulls = worker._get_tp_num_need_pulls(tp)
        choice: tuple[Any, ...] = (meta.remote_request_id, tp)
    else:
        pulls, choice = worker.tp_num_need_pulls, (request,)
    return judged(
        lambda: worker._get_remote_ranks_for_req(*choice),
        _prefill_side(worker, meta),
        decode,
        worker.tp_rank,
        pulls,
    )


def judged(
    choose: Callable[[], list[list[int]]], prefill: Side, decode: Side, rank: int, pulls: int
) -> tuple[str, list[int]] | None:
    """Why the prefill ranks of a release's choice do not do; None if they do.

    Args:
        choose: The release's choice, a list of prefill ranks for each decode rank.
        prefill: The server that is read from.
        decode: This one.
        rank: This decode rank.
        pulls: How many prefill ranks the release reads from.

    Returns:
        The reason, and the prefill ranks that wait for this decode rank all the same.
    """
    try:
        chosen = choose()
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = checks.wrong_ranks(prefill, decode, [], rank, pulls)
        return f"{reason or ''} (the release chooses no ranks: {error})".strip(), []
    reason = checks.wrong_ranks(prefill, decode, chosen, rank, pulls)
    if reason is None:
        return None
    return reason, chosen[rank] if rank < len(chosen) else []


def log_declined(request: str, rank: int, meta: Any, reason: str) -> None:
    """Say that a request is not pulled, and why."""
    log.error(
        "kv pull of request %s by decode rank %d from %s (%s:%d): not begun: %s",
        request,
        rank,
        meta.remote_engine_id,
        meta.remote_host,
        meta.remote_port,
        reason,
    )


def _decline(worker: Any, request: str, meta: Any, reason: str, ranks: list[int]) -> None:
    """Nothing is read, the blocks are invalid, and those that wait for this rank may free them."""
    log_declined(request, worker.tp_rank, meta, reason)
    thread = worker.kv_recv_thread
    failures.of(thread).add(request, _first(meta.local_block_ids), settle_s=0.0)
    if not ranks:
        thread.task_tracker.update_done_task_count(request)
    meta.local_block_ids = meta.remote_block_ids = []
    _queue(worker, request, meta, ranks, pulls=max(1, len(ranks)))


def _first(ids: Any) -> Any:
    # On releases/v0.18.0 a list for each kind of cache; here there is one.
    return ids[0] if isinstance(ids, tuple) else ids


def address(worker: Any, meta: Any, rank: int) -> tuple[str, str]:
    """(host, engine) of a prefill rank."""
    found: tuple[str, str] = worker._get_remote_host_info_by_port(
        meta.remote_port,
        meta.remote_port + rank,
        meta.remote_host,
        meta.remote_engine_id,
        meta.remote_multi_nodes_meta_mapping,
    )
    return found


def _queue(
    worker: Any, request: str, meta: Any, ranks: list[int], *, pulls: int, **more: Any
) -> None:
    """Hand one pull for each prefill rank to the receiving thread."""
    if takes_size(worker):
        more["remote_request_id"] = meta.remote_request_id
    for number, rank in enumerate(ranks):
        host, engine = address(worker, meta, rank)
        worker.kv_recv_thread.add_request(
            request_id=request,
            local_block_ids=_first(meta.local_block_ids),
            remote_block_ids=_first(meta.remote_block_ids),
            remote_engine_id=engine,
            remote_host=host,
            remote_handshake_port=meta.remote_port + rank,
            offset=number,
            tp_num_need_pulls=pulls,
            all_task_done=number == len(ranks) - 1,
            **more,
        )

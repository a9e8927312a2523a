"""vllm-ascend's MooncakeConnectorV1, 0.13 and 0.18: checked before it pulls, failing closed.

The release logs a pull that fails and calls it done; what the blocks held before is then taken for
the prompt. Here its request ends with its blocks reported, and vLLM computes it again or fails it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ascend_patch.impl import kv_ascend_checks as checks
from ascend_patch.impl import kv_ascend_engine, kv_settings
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_listener as listeners
from ascend_patch.impl import kv_ascend_peers as peers
from ascend_patch.impl import kv_ascend_said as said
from ascend_patch.impl import kv_ascend_sizes as sizes
from ascend_patch.impl import kv_ascend_split as split
from ascend_patch.impl import kv_ascend_start as starts
from ascend_patch.impl import kv_ascend_watch as watches
from ascend_patch.impl.kv_ascend_split import ENGINE_FAILED
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DEFAULT_TIMEOUT_S = 60.0
SETTINGS = starts.SETTINGS
WATCH = "ascend_patch_watch"
# Failures of which nothing is on its way: no read was begun, or it had ended.
NOTHING_READ = (ValueError, LookupError, TimeoutError)


def transfer_kv_cache(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._transfer_kv_cache: again where that may help, and a failure is kept."""
    _transfer(wrapped, instance, *args, **kwargs)


def _transfer(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any]) -> None:
    request = req_meta["request_id"]
    state = failures.of(thread)
    peers.asking(thread, req_meta)
    pulls = thread.__dict__[split.NAME].pulls if split.NAME in thread.__dict__ else {}
    planned = pulls.pop((request, req_meta["remote_handshake_port"]), None)
    if state.failed(request):
        return  # it is computed again, or fails: what follows here tells prefill that it is done
    try:
        _attempts(wrapped, thread, req_meta, planned)
    except Exception as error:
        note_failed(thread, req_meta, req_meta["local_block_ids"], error)
        raise


def note_failed(
    thread: Any,
    req_meta: dict[str, Any],
    blocks: Any,
    error: Exception,
    settle_s: float = failures.SETTLE_S,
) -> None:
    """A pull has failed; a read that the engine gave up may write to its blocks all the same.

    Args:
        blocks: Their ids.
        settle_s: For how long after another failure.
    """
    writer = None
    if ENGINE_FAILED in str(error):
        writer = req_meta["remote_host"], req_meta["remote_handshake_port"]
        settle_s = failures.SETTLE_S
    elif isinstance(error, NOTHING_READ):
        settle_s = 0.0
    request = req_meta["request_id"]
    failures.of(thread).add(request, blocks, settle_s=settle_s, writer=writer)
    if writer is not None:
        watch(thread).add(writer)


def watch(thread: Any) -> watches.Watch:
    """Of a receiving thread: what asks prefill ranks whose reads were given up."""
    found: watches.Watch | None = thread.__dict__.get(WATCH)
    if found is None:
        asks = watches.asker(type(thread).__module__)
        found = watches.Watch(asks, lambda rank: _ended(thread, rank), lambda: _tell(thread))
        thread.__dict__[WATCH] = found
    return found


def _ended(thread: Any, rank: watches.Peer) -> None:
    failures.of(thread).wrote(rank)
    split.wrote(thread, rank, failures.SETTLE_S)


def _tell(thread: Any) -> None:
    """The status of this process says how many blocks are kept."""
    from ascend_patch import _runtime

    found = failures.of(thread).snapshot(starts.most_kept(thread))
    state = _runtime.current().state
    before = state.facts.get(failures.FACT)
    if (before or {"requests": 0})["requests"] == found["requests"]:
        return
    if found["requests"]:
        log.warning(
            "%d blocks of %d requests are kept: their prefill ranks stopped in the middle of a "
            "read and may go on with it; above %d nothing more is pulled",
            found["blocks"],
            found["requests"],
            found["limit"],
        )
    state.facts[failures.FACT] = found
    state.write()


def _attempts(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any], planned: Any) -> None:
    settings: kv_settings.Settings = getattr(thread, SETTINGS)
    left, deadline = settings.retries, time.monotonic() + settings.timeout
    while True:
        try:
            _set_device(thread)
            _read(wrapped, thread, req_meta, planned)
            return
        except Exception as error:
            given_up = ENGINE_FAILED in str(error)
            if given_up and planned is not None:
                split.give_up(thread, req_meta)
            _forget(thread, req_meta)
            again = given_up and left > 0 and time.monotonic() < deadline
            again = again and _can_read_again(thread, req_meta)
            blocks = len(req_meta["local_block_ids"])
            log.error(
                "kv pull of request %s by decode rank %d of TP %d, pull %d, from %s at %s:%d: "
                "%s; %s",
                req_meta["request_id"],
                thread.tp_rank,
                thread.tp_size,
                req_meta["offset"],
                req_meta["remote_engine_id"],
                req_meta["remote_host"],
                req_meta["remote_handshake_port"],
                error,
                f"pulling again ({left} left)" if again else f"{blocks} blocks are invalid",
            )
            if not again:
                raise
            left -= 1


def _read(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any], planned: Any) -> None:
    """One attempt; what it read was the request's from its beginning to its end."""
    wanted = bool(req_meta["local_block_ids"])
    if wanted:
        kept.check(thread, req_meta["request_id"])
        peers.ready(thread, req_meta, planned=planned is not None)
    if planned is None:
        wrapped(req_meta)
    else:
        split.read(thread, req_meta, *planned)
    if wanted:
        kept.check(thread, req_meta["request_id"])
        peers.check_held(thread, req_meta)


def _can_read_again(thread: Any, req_meta: dict[str, Any]) -> bool:
    """Whether a read that was given up can write no more: beside it no other may begin.

    What it writes late would be laid over what was computed from the blocks by then.
    """
    rank = req_meta["remote_host"], req_meta["remote_handshake_port"]
    try:
        thread._get_remote_metadata(*rank)
    except Exception as error:
        log.warning("it is not pulled again: its prefill rank does not say what it is: %s", error)
        return False
    time.sleep(failures.SETTLE_S)
    split.wrote(thread, rank, 0.0)
    return True


def _set_device(thread: Any) -> None:
    """The NPU of the caches is this thread's: what is laid out anew is waited for there."""
    device = next(iter(thread.kv_caches.values()))[0].device
    if device.type == "npu":
        torch.npu.set_device(device)


def _forget(thread: Any, req_meta: dict[str, Any]) -> None:
    """What is known of a prefill rank: it may be another process by now."""
    peers.forget(thread, req_meta["remote_engine_id"], req_meta["remote_handshake_port"])


def finished_recving(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> set[str]:
    """KVCacheRecvingThread.get_and_clear_finished_requests: failed ones with their blocks."""
    finished = failures.of(instance).release(wrapped(*args, **kwargs))
    kept.forget(instance, finished)
    return finished


def register_kv_caches(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.register_kv_caches: what a prefill rank says is heard.

    Raises:
        ValueError: A setting makes no sense; or there are more decode ranks than prefill ranks, and
            caches that are not moved between such sizes.
    """
    worker = instance
    settings = kv_settings.read(worker.vllm_config, worker.engine_id, DEFAULT_TIMEOUT_S)
    wrapped(*args, **kwargs)
    listeners.check_started(worker.kv_send_thread)
    side = None
    if not getattr(worker, "_is_hma_required", False):
        side = checks.side_of(worker.vllm_config, worker.kv_caches, tp=worker.tp_size, pp=1)
    thread = worker.kv_recv_thread
    cut = side is not None and (thread is None or split.counts_alike(thread, side))
    if not cut and worker._prefill_tp_size < worker._decode_tp_size:
        reason = "quantised caches, and layers with caches of several shapes, are not cut by head"
        raise ValueError(sizes.unequal(worker._prefill_tp_size, worker._decode_tp_size, reason))
    if thread is not None:
        _listen(worker, thread, side, settings)


def _listen(worker: Any, thread: Any, side: Any, settings: kv_settings.Settings) -> None:
    prepare(thread, settings)
    setattr(worker, starts.SIDE, side)
    if side is not None and split.counts_alike(thread, side):
        setattr(thread, split.NAME, split.Splits(side, worker.tp_rank))
    # From 0.18 a request brings its prefill server's size.
    assumed = None if starts.takes_size(worker) else worker._prefill_tp_size
    said.listen(thread, side, assumed_tp=assumed, assumed_pp=worker._prefill_pp_size)


def prepare(thread: Any, settings: kv_settings.Settings) -> None:
    """A receiving thread, before the first request."""
    failures.of(thread)
    watch(thread)
    setattr(thread, SETTINGS, settings)
    if next(iter(thread.kv_caches.values()))[0].device.type != "npu":
        thread.engine = kv_ascend_engine.InBatches(thread.engine)


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.start_load_kv: without the requests that it cannot pull."""
    _start(wrapped, instance, *args, **kwargs)


def _start(wrapped: Wrapped, worker: Any, metadata: Any) -> None:
    if worker.kv_recv_thread is not None:
        starts.start(worker, metadata)
        starts.each(wrapped, metadata, lambda *one: starts.decline_begun(worker, *one))
    wrapped(metadata)
    held.announced(worker, metadata)


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

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
from ascend_patch.impl import kv_ascend_failures as failures
from ascend_patch.impl import kv_ascend_kept as kept
from ascend_patch.impl import kv_ascend_peers as peers
from ascend_patch.impl import kv_ascend_sizes as sizes
from ascend_patch.impl import kv_ascend_split as split
from ascend_patch.impl import kv_ascend_start as starts
from ascend_patch.impl import kv_settings
from ascend_patch.impl.kv_ascend_split import ENGINE_FAILED
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

DEFAULT_TIMEOUT_S = 60.0
SETTINGS = "ascend_patch_settings"
RANGES = 1024


def transfer_kv_cache(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """KVCacheRecvingThread._transfer_kv_cache: again where that may help, and a failure is kept."""
    _transfer(wrapped, instance, *args, **kwargs)


def _transfer(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any]) -> None:
    request = req_meta["request_id"]
    state = failures.of(thread)
    peers.silence(thread).engine = req_meta["remote_engine_id"]
    pulls = thread.__dict__[split.NAME].pulls if split.NAME in thread.__dict__ else {}
    planned = pulls.pop((request, req_meta["remote_handshake_port"]), None)
    if state.failed(request):
        return  # it is computed again, or fails: what follows here tells prefill that it is done
    try:
        _attempts(wrapped, thread, req_meta, planned)
    except Exception:
        state.add(request, req_meta["local_block_ids"])
        raise


def _attempts(wrapped: Wrapped, thread: Any, req_meta: dict[str, Any], planned: Any) -> None:
    settings: kv_settings.Settings = getattr(thread, SETTINGS)
    left, deadline = settings.retries, time.monotonic() + settings.timeout
    while True:
        try:
            _set_device(thread)
            if req_meta["local_block_ids"]:
                kept.check(thread, req_meta["request_id"])
            if planned is None:
                wrapped(req_meta)
            else:
                split.read(thread, req_meta, *planned)
            if req_meta["local_block_ids"]:
                kept.check(thread, req_meta["request_id"])
            return
        except Exception as error:
            _forget(thread, req_meta)
            again = ENGINE_FAILED in str(error) and left > 0 and time.monotonic() < deadline
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


def _set_device(thread: Any) -> None:
    """The NPU of the caches is this thread's: what is laid out anew is waited for there."""
    device = next(iter(thread.kv_caches.values()))[0].device
    if device.type == "npu":
        torch.npu.set_device(device)


def _forget(thread: Any, req_meta: dict[str, Any]) -> None:
    """What is known of a prefill rank: it may be another process by now."""
    engine, port = req_meta["remote_engine_id"], req_meta["remote_handshake_port"]
    for known in (thread.kv_caches_base_addr, thread.remote_te_port):
        known[engine].pop(port, None)


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
    if side is None:
        return
    if split.counts_alike(thread, side):
        setattr(thread, split.NAME, split.Splits(side, worker.tp_rank))
    # From 0.18 a request brings its prefill server's size.
    assumed = None if starts.takes_size(worker) else worker._prefill_tp_size
    thread.decoder = peers.Decoder(
        type(thread), side, assumed_tp=assumed, assumed_pp=worker._prefill_pp_size
    )


def prepare(thread: Any, settings: kv_settings.Settings) -> None:
    """A receiving thread, before the first request."""
    failures.of(thread)
    setattr(thread, SETTINGS, settings)
    if next(iter(thread.kv_caches.values()))[0].device.type != "npu":
        thread.engine = InBatches(thread.engine)


class InBatches:
    """A transfer engine that is given so many ranges at a time.

    Over TCP Mooncake refuses more than some 2000, and everything after them. An NPU's has no such
    limit.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def batch_transfer_sync_read(
        self, session: str, local: list[int], remote: list[int], lengths: list[int]
    ) -> int:
        """As the engine's; the first answer that is an error."""
        for first in range(0, len(local), RANGES):
            part = slice(first, first + RANGES)
            batch = local[part], remote[part], lengths[part]
            code: int = self._engine.batch_transfer_sync_read(session, *batch)
            if code < 0:
                return code
        return 0


def start_load_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.start_load_kv: without the requests that it cannot pull."""
    _start(wrapped, instance, *args, **kwargs)


def _start(wrapped: Wrapped, worker: Any, metadata: Any) -> None:
    if worker.kv_recv_thread is not None:
        starts.start(worker, metadata)
    wrapped(metadata)


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

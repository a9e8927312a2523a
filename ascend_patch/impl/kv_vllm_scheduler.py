"""What only vLLM's scheduler knows of a pull: how long the prompt is, and what of it is cached.

Block lists may go on behind the prompt (blocks kept for drafts), and block sizes may differ; which
blocks belong together follows from these numbers and not from the lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CONNECTOR = "MooncakeConnector"
PULLS, ASIDE = "ascend_patch_pulls", "ascend_patch_set_aside"
Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def update_state_after_alloc(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.update_state_after_alloc: note the prompt of a new pull."""
    found = wrapped(*args, **kwargs)
    _note(instance, *args, **kwargs)
    return found


def _note(scheduler: Any, request: Any, blocks: Any, num_external_tokens: int) -> None:
    if request.request_id in scheduler._reqs_need_recv and num_external_tokens > 0:
        tokens = len(request.prompt_token_ids or ())
        size = scheduler.vllm_config.cache_config.block_size
        noted = scheduler.__dict__.setdefault(PULLS, {})
        noted[request.request_id] = (tokens, (tokens - num_external_tokens) // size)


def build_connector_meta(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.build_connector_meta: the workers are told."""
    found = wrapped(*args, **kwargs)
    noted = instance.__dict__.get(PULLS, {})
    for metas in found.reqs_to_recv.values():
        for request, meta in metas.items():
            meta.ascend_patch_tokens, meta.ascend_patch_cached = noted.pop(request, (None, None))
    return found


def handle_invalid_blocks(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Scheduler._handle_invalid_blocks: a request that fails has no tokens of its cache counted.

    The host reports -1 of them, which its counter of prompt tokens refuses: then the front end
    ends, and every other request with it.
    """
    found = wrapped(*args, **kwargs)
    for name in found or ():
        request = instance.requests.get(name)
        if request is not None and request.num_cached_tokens < 0:
            request.num_cached_tokens = 0
    return found


def recompute_elsewhere(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """Scheduler._handle_invalid_blocks: a request that is computed again gets other blocks.

    The host computes it into the same ones, and so waits until every rank has reported that nobody
    writes to them. Here they are set aside until then, and the request goes on at once.
    """
    before = set(instance.failed_recving_kv_req_ids)
    found = handle_invalid_blocks(wrapped, instance, args, kwargs)
    # Of other connectors it is not known that they report a request once more when it is over.
    if instance.recompute_kv_load_failures and type(instance.connector).__name__ == CONNECTOR:
        for name in instance.failed_recving_kv_req_ids - before:
            _set_aside(instance, name)
    return found


def _set_aside(scheduler: Any, name: str) -> None:
    request, manager = scheduler.requests.get(name), scheduler.kv_cache_manager
    if request is None or request.status.name != "WAITING_FOR_REMOTE_KVS":
        return
    pool = manager.block_pool
    blocks: list[Any] = []
    # The request forgets its blocks, and the pool does not get them.
    pool.free_blocks = blocks.extend
    try:
        manager.free(request)
    finally:
        del pool.free_blocks
    scheduler.__dict__.setdefault(ASIDE, {})[name] = blocks
    request.num_computed_tokens = 0
    # For the scheduler it has been received, with nothing in it.
    scheduler.finished_recving_kv_req_ids.add(name)


def update_from_kv_xfer_finished(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Scheduler._update_from_kv_xfer_finished: blocks that were set aside go back to the pool."""
    _give_back(instance, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _give_back(scheduler: Any, kv_connector_output: Any) -> None:
    aside = scheduler.__dict__.get(ASIDE)
    if not aside or not kv_connector_output.finished_recving:
        return
    for name in aside.keys() & kv_connector_output.finished_recving:
        scheduler.kv_cache_manager.block_pool.free_blocks(aside.pop(name))
        # The request itself went on long ago.
        kv_connector_output.finished_recving.discard(name)

"""What only vLLM's scheduler knows of a pull: how long the prompt is, and what of it is cached.

Block lists may go on behind the prompt (blocks kept for drafts), and block sizes may differ; which
blocks belong together follows from these numbers and not from the lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PULLS = "ascend_patch_pulls"
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

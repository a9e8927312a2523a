"""vllm-ascend's MooncakeConnectorV1: which requests its scheduler takes, and which blocks it keeps.

The releases hand a request's kv_transfer_params to their workers as they are. A number that is text
there ends the engine, and every request with it; one that is too large takes its memory. Here they
are checked once, before a block is taken for them: a request that cannot be pulled is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend_limits as limits
from ascend_patch.impl.kv_vllm_wire import log

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

ADMITTED = "ascend_patch_admitted"
# Requests whose pulls were handed to workers and have not ended: in 0.11 and 0.13, whose vLLM gives
# the blocks of an aborted request to others at once.
PULLING = "ascend_patch_pulling"
PRODUCER, CONSUMER = "kv_producer", "kv_consumer"


def get_num_new_matched_tokens(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> tuple[int, bool]:
    """MooncakeConnectorScheduler.get_num_new_matched_tokens: only of what can be pulled."""
    _admit(instance, *args, **kwargs)
    found: tuple[int, bool] = wrapped(*args, **kwargs)
    return found


def _admit(scheduler: Any, request: Any, *_: Any, **__: Any) -> None:
    if request.kv_transfer_params is None or request.__dict__.get(ADMITTED):
        return
    setattr(request, ADMITTED, True)
    reason = _refused(scheduler, request)
    if reason is None:
        return
    log.error(
        "request %.200s is not pulled, and its prompt is computed here: %s",
        request.request_id,
        reason,
    )
    if isinstance(request.kv_transfer_params, dict):
        request.kv_transfer_params.update(do_remote_prefill=False, do_remote_decode=False)
    else:
        request.kv_transfer_params = None


def _refused(scheduler: Any, request: Any) -> str | None:
    """Why a request is not taken as it is; None if it is."""
    given = request.kv_transfer_params
    if not isinstance(given, dict):
        return f"kv_transfer_params is a {type(given).__name__}, and no object"
    role = scheduler.vllm_config.kv_transfer_config.kv_role
    if given.get("do_remote_decode") and role == CONSUMER:
        return (
            "it asks a decode server to keep its blocks for another (do_remote_decode), which "
            "nothing would free; send it to the prefill server"
        )
    if not given.get("do_remote_prefill"):
        return None
    if role == PRODUCER:
        return (
            "it asks a prefill server to pull (do_remote_prefill), which cannot; send it to the "
            "decode server"
        )
    if not isinstance(request.prompt_token_ids, list | tuple):
        return "its prompt has no token ids, and what is pulled is counted by them"
    try:
        limits.parameters(given, prefill_of(scheduler))
    except limits.LimitError as error:
        return str(error)
    return None


def prefill_of(scheduler: Any) -> limits.Prefill:
    """What a scheduler's configuration and release say of prefill servers."""
    told = scheduler.vllm_config.kv_transfer_config.get_from_extra_config("prefill", {})
    host = sys.modules[type(scheduler).__module__]
    return limits.Prefill(
        tp=told.get("tp_size", 1),
        stages=told.get("pp_size", 1),
        named_request="remote_request_id" in host.ReqMeta.__annotations__,
        kinds=hasattr(host, "SupportsHMA"),
    )


def takes_decode(scheduler: Any) -> bool:
    """Whether this server keeps blocks for a decode server: one that pulls has nobody to free."""
    return bool(scheduler.vllm_config.kv_transfer_config.kv_role != CONSUMER)


def began(scheduler: Any, requests: Any) -> None:
    """Pulls that the workers are told of."""
    scheduler.__dict__.setdefault(PULLING, set()).update(requests)


def pulls(scheduler: Any, request: str) -> bool:
    """Whether a rank may be writing to a request's blocks still."""
    return request in scheduler.__dict__.get(PULLING, ())


def update_from_kv_xfer_finished(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> Any:
    """Scheduler._update_from_kv_xfer_finished of 0.13: an aborted request's blocks are free now."""
    _finished(instance, *args, **kwargs)
    return wrapped(*args, **kwargs)


def ended(scheduler: Any, names: Any) -> set[str]:
    """Of pulls that have ended those whose requests were aborted meanwhile; their blocks are freed.

    Args:
        scheduler: vLLM's.
        names: Requests that all ranks have ended.
    """
    connector = getattr(scheduler.connector, "connector_scheduler", None)
    pulling = getattr(connector, "__dict__", {}).get(PULLING)
    gone: set[str] = set()
    for name in list(names or ()):
        if pulling is None or name not in pulling:
            continue
        pulling.discard(name)
        request = scheduler.requests.get(name)
        if request is not None and request.is_finished():
            scheduler._free_blocks(request)
            gone.add(name)
    return gone


def _finished(scheduler: Any, kv_connector_output: Any) -> None:
    gone = ended(scheduler, kv_connector_output.finished_recving)
    if gone:
        kv_connector_output.finished_recving -= gone

"""vllm-ascend's MooncakeConnectorV1: for how long prefill keeps a request's blocks.

Prefill frees blocks that nobody has read for VLLM_NIXL_ABORT_REQUEST_TIMEOUT (to 0.13) or
VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT (0.18) seconds. The release's decode side knows nothing of it: a
request that waited longer in its queue is read all the same, and what is there is another's. A
prefill server with the shim says how long; of another one decode's own setting is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ascend_patch.impl import kv_ascend_admit as admit
from ascend_patch.impl import kv_ascend_held as held
from ascend_patch.impl import kv_ascend_limits as limits

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

OLDER, NEWER = "VLLM_NIXL_ABORT_REQUEST_TIMEOUT", "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT"
# In kv_transfer_params, which a proxy hands on as it is; and in what the workers are told.
KEEPS, UNTIL = "ascend_patch_keeps_s", "ascend_patch_until"
# Decode counts from the request's arrival there, which is a little after prefill's end.
SHARE = 0.95
NAME = "ascend_patch_kept"


def keeps_s(scheduler: Any) -> float:
    """Seconds for which a prefill server with this one's settings keeps blocks."""
    from vllm import envs

    return float(getattr(envs, NEWER if ".kv_p2p." in type(scheduler).__module__ else OLDER))


def request_finished(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.request_finished: which blocks are kept, and for how long.

    Decode is told how long prefill keeps the blocks, and which attempt they are of. The blocks of
    an aborted request are kept while a rank may write to them (0.11 and 0.13, which free them).
    """
    return _finished(wrapped, instance, *args, **kwargs)


def _finished(wrapped: Wrapped, scheduler: Any, request: Any, *blocks: Any, **named: Any) -> Any:
    if admit.pulls(scheduler, request.request_id):
        return True, None
    if not admit.takes_decode(scheduler):
        return False, None
    kept, parameters = wrapped(request, *blocks, **named)
    if kept and parameters is not None:
        parameters[KEEPS] = keeps_s(scheduler)
        parameters[held.ATTEMPT] = held.draw(scheduler, request.request_id)
    return kept, parameters


def build_connector_meta(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.build_connector_meta: the workers are told until when."""
    own, waiting = keeps_s(instance), instance._reqs_need_recv.items()
    told = {name: (_until(request, own), _attempt(request)) for name, (request, *_) in waiting}
    found = wrapped(*args, **kwargs)
    for name, meta in found.requests.items():
        until, attempt = told[name]
        setattr(meta, UNTIL, until)
        setattr(meta, held.ATTEMPT, attempt)
    held.tell(instance, found)
    if frees_at_once(instance):
        admit.began(instance, [name for name, m in found.requests.items() if m.local_block_ids])
    return found


def frees_at_once(scheduler: Any) -> bool:
    """Whether this vLLM gives the blocks of an aborted request away while it is pulled."""
    return ".kv_p2p." not in type(scheduler).__module__


def _attempt(request: Any) -> str:
    return held.of_request(request.kv_transfer_params)


def _until(request: Any, own: float) -> float:
    said = (request.kv_transfer_params or {}).get(KEEPS)
    try:
        kept = own if said is None else limits.keeps(said)
    except limits.LimitError:
        kept = own
    return float(request.arrival_time) + SHARE * kept


def note(thread: Any, requests: dict[str, Any]) -> None:
    """New requests of a receiving thread."""
    kept = thread.__dict__.setdefault(NAME, {})
    for name, meta in requests.items():
        held.note(thread, name, meta)
        if hasattr(meta, UNTIL):
            kept[name] = getattr(meta, UNTIL)


def forget(thread: Any, requests: set[str]) -> None:
    """Requests that have ended."""
    kept = thread.__dict__.get(NAME, {})
    for name in requests:
        kept.pop(name, None)


def check(thread: Any, request: str) -> None:
    """Whether a request's blocks are certainly there still.

    Raises:
        TimeoutError: They may be another request's by now.
    """
    until = thread.__dict__.get(NAME, {}).get(request)
    late = None if until is None else time.time() - until
    if late is not None and late > 0:
        raise TimeoutError(
            f"prefill keeps a request's blocks for a while, which ended {late:.0f} s ago, and they "
            f"may be another's; raise {NEWER} ({OLDER} to 0.13) of both servers, or send fewer "
            "requests at a time"
        )

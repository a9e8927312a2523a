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
    """MooncakeConnectorScheduler.request_finished: decode is told how long the blocks are kept."""
    kept, parameters = wrapped(*args, **kwargs)
    if kept and parameters is not None:
        parameters[KEEPS] = keeps_s(instance)
    return kept, parameters


def build_connector_meta(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.build_connector_meta: the workers are told until when."""
    own, waiting = keeps_s(instance), instance._reqs_need_recv.items()
    until = {name: _until(request, own) for name, (request, *_) in waiting}
    found = wrapped(*args, **kwargs)
    for name, meta in found.requests.items():
        setattr(meta, UNTIL, until[name])
    return found


def _until(request: Any, own: float) -> float:
    said = (request.kv_transfer_params or {}).get(KEEPS)
    kept = float(said) if isinstance(said, int | float) and said > 0 else own
    return float(request.arrival_time) + SHARE * kept


def note(thread: Any, requests: dict[str, Any]) -> None:
    """New requests of a receiving thread."""
    kept = thread.__dict__.setdefault(NAME, {})
    for name, meta in requests.items():
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

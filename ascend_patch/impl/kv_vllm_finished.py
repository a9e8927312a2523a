"""What has finished on a worker, asked for in every step: never waited for without a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, TimeoutError
from typing import Any

from ascend_patch.impl.kv_vllm_wire import log

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Found = tuple[set[str] | None, set[str] | None]

# How long a step waits for a loop that does not answer; later steps do not wait for it again.
WAIT_S = 1.0
PENDING = "ascend_patch_pending"


def get_finished(wrapped: Callable[..., Found], instance: Any, args: Args, kwargs: Kwargs) -> Found:
    """MooncakeConnectorWorker.get_finished: (sent, received) requests, in a bounded time."""
    received: set[str] = set()
    sent: set[str] = set()
    if not instance.is_kv_producer:
        received = _ask(instance, "receiver", instance.fetch_finished_recving_reqs)
    if not instance.is_kv_consumer:
        sent = _ask(instance, "sender", instance.fetch_finished_sending_reqs)
    return sent or None, received or None


def _ask(worker: Any, name: str, fetch: Callable[[], Coroutine[Any, Any, set[str]]]) -> set[str]:
    """What has finished in one of the worker's loops; nothing while the loop does not answer.

    A question that has no answer is kept: its answer is given once, and may be late.
    """
    pending: dict[str, Future[set[str]]] = worker.__dict__.setdefault(PENDING, {})
    asked = pending.pop(name, None)
    late = asked is not None
    if asked is None:
        asked = asyncio.run_coroutine_threadsafe(fetch(), getattr(worker, f"{name}_loop"))
    try:
        found = asked.result(0 if late else WAIT_S)
    except TimeoutError:
        pending[name] = asked
        if not late:
            log.error(
                "kv connector: the %s loop of rank %d has not answered for %.0f s; requests that "
                "finish there are reported when it does",
                name,
                worker.tp_rank,
                WAIT_S,
            )
        return set()
    if late:
        log.warning("kv connector: the %s loop of rank %d answers again", name, worker.tp_rank)
    return found

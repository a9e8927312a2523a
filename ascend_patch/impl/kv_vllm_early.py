"""vLLM's Mooncake connector, 0.13 to 0.15: what does not fit is refused, and what fails is said.

There decode rank r asks prefill rank r whatever the sizes are, and a failed transfer leaves its
request waiting for ever. A prefill server tells its TP size in the parameters that it returns for
decode; one without ascend-patch tells nothing, and is believed to be of equal size, as before.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ascend_patch.impl import kv_limits, kv_settings, kv_vllm_quarantine
from ascend_patch.impl.kv_vllm import RECEIVER, SETTINGS
from ascend_patch.impl.kv_vllm_link import Link, LostError
from ascend_patch.impl.kv_vllm_wire import log

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Wrapped = Callable[..., Any]

TP_SIZE = "ascend_patch_tp_size"
# How long 0.13 to 0.15 wait.
DEFAULT_TIMEOUT_S = 60.0
DONE = b"trans_done"


def worker_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    """MooncakeConnectorWorker.__init__: read our settings."""
    settings = _settings(*args, **kwargs)
    wrapped(*args, **kwargs)
    setattr(instance, SETTINGS, settings)


def _settings(vllm_config: Any, engine_id: str) -> kv_settings.Settings:
    return kv_settings.read(vllm_config, engine_id, DEFAULT_TIMEOUT_S)


class Failures:
    """What a decode rank did not get; read by the worker's own thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._invalid: set[int] = set()

    def add(self, blocks: list[int]) -> None:
        """Blocks that were not loaded."""
        with self._lock:
            self._invalid.update(blocks)

    def take_invalid(self) -> set[int]:
        """The same, each reported once."""
        with self._lock:
            found, self._invalid = self._invalid, set()
        return found


def request_finished(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.request_finished: a prefill server tells its TP size."""
    delay, parameters = wrapped(*args, **kwargs)
    if parameters is not None:
        parameters[TP_SIZE] = instance.vllm_config.parallel_config.tensor_parallel_size
    return delay, parameters


def build_connector_meta(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorScheduler.build_connector_meta: the workers learn prefill's TP size."""
    pulls = dict(instance._reqs_need_recv)
    found = wrapped(*args, **kwargs)
    for request, meta in found.reqs_to_recv.items():
        meta.ascend_patch_tp = (pulls[request][0].kv_transfer_params or {}).get(TP_SIZE)
    return found


def group_kv_pull(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorWorker.group_kv_pull: without the requests that cannot be pulled."""
    _refuse(instance, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _refuse(worker: Any, metadata: Any) -> None:
    for request, meta in list(metadata.reqs_to_recv.items()):
        size = getattr(meta, "ascend_patch_tp", None)
        if size is None or size == worker.tp_size:
            continue
        del metadata.reqs_to_recv[request]
        log.error(
            "kv pull of request %s, prefill TP %d -> decode TP %d, decode rank %d, from %s:%d: "
            "failed: this release moves KV between equal TP sizes only; give both servers the same "
            "--tensor-parallel-size, or use vLLM 0.16 to 0.18 with ascend-patch on both sides",
            request,
            size,
            worker.tp_size,
            worker.tp_rank,
            meta.remote_host,
            meta.remote_port,
        )
        failures(worker).add(meta.local_block_ids)
        _finish(worker, [(request, meta.local_block_ids)])


def failures(worker: Any) -> Failures:
    """Of a worker, made when it is first needed."""
    found: Failures = worker.__dict__.setdefault(RECEIVER, Failures())
    return found


def _finish(worker: Any, pulls: list[tuple[str, list[int]]]) -> None:
    """Nobody writes to these requests' blocks any more."""
    done = worker.finished_recving_reqs
    # 0.13 keeps the set beside a lock, which it takes in one thread alone.
    getattr(done, "set", done).update(request for request, blocks in pulls if blocks)


def receive_kv(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Awaitable[None]:
    """MooncakeConnectorWorker.receive_kv: bounded in time, and what fails is reported."""
    return _receive(instance, *args, **kwargs)


async def _receive(worker: Any, path: str, req_blocks: list[tuple[str, list[int]]]) -> None:
    import importlib

    host = importlib.import_module(type(worker).__module__)
    timeout = getattr(worker, SETTINGS).timeout
    requests, blocks = [one for one, _ in req_blocks], [ids for _, ids in req_blocks]
    asked = host.MooncakeAgentMetadata(
        remote_hostname=worker.hostname,
        remote_port=worker.rpc_port,
        request_ids=requests,
        kv_caches_base_addr=worker.kv_caches_base_addr,
        block_ids=blocks,
    )
    try:
        link = Link(worker.async_zmq_ctx, path)
    except (LostError, kv_limits.LimitError) as error:
        _fail(worker, req_blocks, path, str(error))
        _finish(worker, req_blocks)
        return
    lost = False
    try:
        # The envelope of the REQ socket that the host uses.
        await link.socket.send_multipart([b"", worker._encoder.encode(asked)])
        try:
            reason = await _wait(link, timeout)
        except LostError as error:
            lost, reason = True, str(error)
        if reason is not None:
            _fail(worker, req_blocks, path, reason or f"there was no answer within {timeout:g} s")
        if reason == "":
            # It may be writing still: the blocks are kept until it answers or has ended.
            try:
                await _wait(link, None)
            except LostError:
                lost = True
    finally:
        link.close()
    if lost:
        # This protocol has no field for another port. A shutdown that closes this one while a push
        # is under way is taken for an end.
        await kv_vllm_quarantine.until_ended(lambda: kv_vllm_quarantine.has_ended(path))
    _finish(worker, req_blocks)


def _fail(worker: Any, pulls: list[tuple[str, list[int]]], path: str, reason: str) -> None:
    log.error(
        "kv pull of requests %s by decode rank %d (TP %d) from prefill rank %d at %s: failed: %s",
        [request for request, _ in pulls],
        worker.tp_rank,
        worker.tp_size,
        worker.tp_rank,
        path,
        reason,
    )
    for _, ids in pulls:
        failures(worker).add(ids)


async def _wait(link: Link, timeout: float | None) -> str | None:
    """None if it was pushed, else why not; empty if nothing was heard in so many seconds.

    Raises:
        LostError: The connection was refused, or ended.
    """
    while True:
        frames = await link.receive(3600.0 if timeout is None else timeout)
        if frames is not None:
            return (
                None if frames[-1] == DONE else "the prefill server reports an error; see its log"
            )
        if timeout is not None:
            return ""


def send_kv_to_decode(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """MooncakeConnectorWorker.send_kv_to_decode: a request that is gone is an error.

    The host sends nothing then, and tells the decode server that it is done.
    """
    _check_known(instance, *args, **kwargs)
    return wrapped(*args, **kwargs)


def _check_known(worker: Any, meta: Any) -> None:
    # 0.13 keeps them beside a lock.
    known = getattr(worker.reqs_need_send, "reqs", worker.reqs_need_send)
    gone = [request for request in meta.request_ids if request not in known]
    if gone:
        raise RuntimeError(
            f"requests {gone} are not here: their blocks were freed because nobody fetched them in "
            "time, or the prefill server was restarted"
        )

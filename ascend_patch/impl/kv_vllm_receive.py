"""What a decode rank keeps for all of its pulls: where prefill servers are, and what failed."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from ascend_patch.impl import kv_handshake, kv_settings, kv_vllm_bootstrap
from ascend_patch.impl.kv_vllm_pull import Pull
from ascend_patch.impl.kv_vllm_quarantine import Process, Quarantine
from ascend_patch.impl.kv_vllm_talk import REPEAT_S, PullError
from ascend_patch.impl.kv_vllm_wire import ASK, PROCESS_PORT, Ask, log
from ascend_patch.kernels.kv_layout import Merge, Plan, Side, merge_head_shards_

SAME_S = 0.2
REST_S = 0.005
# Prefill servers, and addresses of bootstrap servers: clients may name any.
RECENT = 1024
Value = TypeVar("Value")


class Recent(OrderedDict[str, Value]):
    """The last `RECENT` that were added or changed."""

    def __setitem__(self, name: str, value: Value) -> None:
        super().__setitem__(name, value)
        self.move_to_end(name)
        while len(self) > RECENT:
            self.popitem(last=False)

    def add(self, name: str) -> None:
        """Add one that has no value."""
        self[name] = True  # type: ignore[assignment]


class Receiver:
    """One decode rank's part of the transfers; `worker` is the host's MooncakeConnectorWorker.

    Attributes:
        timeout: Seconds that a pull may take, with all its attempts.
        retries: Attempts after the first one.
        repeat: Seconds after which what had no answer is said again.
        patched: Prefill servers that were seen to have ascend_patch.
        processes: The ranks of those, by engine id and address.
        quarantine: Blocks that are kept although their requests have ended.
        views: The rank's regions as tensors; see `kv_vllm_caches.Region`.
    """

    def __init__(
        self,
        worker: Any,
        side: Side,
        model: str,
        *,
        timeout: float,
        retries: int,
        views: Any,
        quarantine: float = kv_settings.DEFAULT_QUARANTINE,
    ) -> None:
        self.worker, self.side = worker, side
        self.quarantine = Quarantine(worker.num_blocks, quarantine)
        self.timeout, self.retries, self.repeat = timeout, retries, min(REPEAT_S, timeout / 10)
        self.said, self.model = kv_handshake.say(side, model), model
        self.views = views
        self.patched: Recent[bool] = Recent()
        self.processes: Recent[Process] = Recent()
        self._agents: Recent[dict[int, str]] = Recent()
        self._queries: Recent[tuple[float, Any]] = Recent()
        self._tasks: set[Any] = set()
        # Read by the worker's own thread, written by its receiver loop.
        self._lock = threading.Lock()
        self._invalid: set[int] = set()

    async def start(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin to pull requests: prefill engine -> request -> the host's PullReqMeta."""
        for metas in wanted.values():
            for meta in metas.values():
                task = asyncio.ensure_future(Pull(self, meta).run())
                # The loop keeps no strong reference to a task.
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def agents(self, meta: Any, *, fresh: bool) -> dict[int, str]:
        """Tensor-parallel rank -> address of the prefill server that has a request.

        Raises:
            PullError: Its bootstrap server does not answer, or knows no such server.
        """
        engine, address = meta.remote_engine_id, meta.remote_bootstrap_addr
        if fresh or engine not in self._agents:
            self._agents.update(await self._look_up(address))
        if engine not in self._agents:
            raise PullError(
                f"the bootstrap server at {address} knows no prefill server {engine}; it was "
                "restarted, or the proxy names another one",
                again=True,
            )
        return self._agents[engine]

    async def _look_up(self, address: str) -> dict[str, dict[int, str]]:
        """One question for all requests that ask at the same time."""
        asked, query = self._queries.get(address, (0.0, None))
        now = time.monotonic()
        if query is None or (query.done() and now - asked > SAME_S):
            query = asyncio.ensure_future(self._query(address))
            self._queries[address] = now, query
        found: dict[str, dict[int, str]] = await asyncio.shield(query)
        return found

    async def _query(self, address: str) -> dict[str, dict[int, str]]:
        try:
            return await kv_vllm_bootstrap.query(address)
        except kv_vllm_bootstrap.QueryError as error:
            raise PullError(str(error), again=True) from error

    def greet(self, engine: str, peer: kv_handshake.Peer) -> None:
        """A prefill server is heard for the first time: what cannot be checked is said."""
        if engine in self.patched:
            return
        self.patched[engine] = True
        names = [str(name).rstrip("/").rpartition("/")[2] for name in (peer.model, self.model)]
        log.info("kv peer: prefill server %s, ascend-patch %s, %s", engine, peer.shim, names[0])
        if names[0] != names[1]:
            log.warning(
                "kv peer: prefill server %s serves %s and this one %s; their caches have the same "
                "shape, and whether they are one model cannot be seen from here",
                engine,
                *names,
            )

    def process(self, place: str, address: str, told: dict[str, Any]) -> Process:
        """The prefill process that says this of itself; `told` is checked."""
        found = self.processes.get(place)
        if found is None or (found.nonce, found.port) != (told["nonce"], told.get(PROCESS_PORT)):
            found = Process(address, told["nonce"], told.get(PROCESS_PORT))
            self.processes[place] = found
        return found

    def side_of(self, tp: int) -> Side:
        """What a prefill server of this TP size is, until it says so itself."""
        return replace(self.side, tp=tp)

    def ask(self, pull: Pull, rank: int, sends: bool, prefill_tp: int, attempt: int) -> Ask:
        """The message that asks a prefill rank for a request, or tells it to free its blocks."""
        worker, meta = self.worker, pull.meta
        return Ask(
            # Where TP sizes differ an unpatched prefill server must refuse it; one that is known to
            # be patched may be asked twice, because nobody else would understand.
            remote_hostname=(
                worker.hostname
                if prefill_tp == self.side.tp and meta.remote_engine_id not in self.patched
                else msgspec.UNSET
            ),
            remote_port=worker.rpc_port,
            remote_tp_size=worker.tp_size,
            remote_tp_rank=worker.tp_rank,
            req_blocks={pull.request: (pull.transfer, pull.blocks if sends else [])},
            kv_caches_base_addr=worker.kv_caches_base_addr,
            ascend_patch=self.said
            | {
                "kind": ASK,
                "epoch": f"{uuid.uuid4().hex}-{attempt}",
                "puller": worker.engine_id,
                "hostname": worker.hostname,
                "prefill_tp": prefill_tp,
                "num_blocks": worker.num_blocks,
                "tokens": getattr(meta, "ascend_patch_tokens", None),
                "cached_blocks": getattr(meta, "ascend_patch_cached", None),
            },
        )

    async def merge(self, plan: Plan, blocks: Sequence[int]) -> None:
        """Make blocks of the shards that lie in them."""
        merges = plan.merges(self.worker.tp_rank)
        if merges:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, self._merge, merges, blocks)

    def _merge(self, merges: tuple[Merge, ...], blocks: Sequence[int]) -> None:
        import torch

        for one in merges:
            views = [self.views[number] for number in one.regions]
            # This thread has a device of its own.
            on_device = views[0].device.type != "cpu"
            if on_device:
                torch.accelerator.set_device_index(views[0].device.index)
            parts_dim = 1 if self.side.combined else None
            merge_head_shards_(views, blocks, one.shards, parts_dim=parts_dim)
            if on_device:
                torch.accelerator.synchronize()

    def rest(self) -> None:
        """Leave the core to whoever sends, if this rank waits for KV and has computed nothing.

        vLLM asks in a loop whether something has arrived, and its ranks poll for the question: on a
        CPU they take the cores that prefill needs to send it, for tens of seconds.
        """
        if self._tasks and self.views[0].device.type == "cpu" and not _computes():
            time.sleep(REST_S)

    def fail(self, pull: Pull, sentence: str) -> None:
        """Report a request's blocks as not loaded."""
        log.error("%s: failed: %s", pull.name, sentence)
        with self._lock:
            self._invalid.update(pull.blocks)

    def finish(self, pull: Pull) -> None:
        """Report that nobody writes to a request's blocks any more."""
        log.debug("%s: finished%s", pull.name, "" if pull.blocks else "; it needed no blocks")
        # Without blocks vLLM waits for nothing, and may have forgotten the request.
        if pull.blocks:
            self.worker.finished_recving_reqs.add(pull.request)

    def take_invalid(self) -> set[int]:
        """Blocks that were not loaded, each reported once."""
        with self._lock:
            found, self._invalid = self._invalid, set()
        return found


def _computes() -> bool:
    """Whether the step that is about to end ran the model; the worker's own thread asks."""
    from vllm import forward_context

    if not forward_context.is_forward_context_available():
        return True
    return forward_context.get_forward_context().attn_metadata is not None

"""The decode side of vLLM's Mooncake connector, 0.16 to 0.18: asks each prefill rank it needs.

A pull ends in a bounded time. What was not pulled is reported to vLLM, which fails the request or
computes it again (kv_load_failure_policy), at once; that its blocks may be given away is reported
when nobody can write to them any more.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ascend_patch.impl import kv_handshake, kv_vllm_plan
from ascend_patch.impl.kv_vllm_link import Link
from ascend_patch.impl.kv_vllm_talk import Conversation, PullError
from ascend_patch.impl.kv_vllm_wire import log
from ascend_patch.kernels.kv_layout import Plan, Refusal

BACKOFF_S = 0.5


class Pull:
    """One request of a decode rank, from all prefill ranks that it needs."""

    def __init__(self, receiver: Any, meta: Any) -> None:
        self.receiver, self.meta = receiver, meta
        self.request, self.transfer = meta.d_req_id, meta.transfer_id
        self.blocks: list[int] = list(meta.local_block_ids)
        self.deadline = time.monotonic() + receiver.timeout
        self.done: set[int] = set()
        self.plan: Plan | None = None
        self.ratio = ""
        # Those that failed, and of them those that are being ended.
        self.parting: list[Conversation] = []
        self.settling: dict[Conversation, asyncio.Future[None]] = {}

    async def run(self) -> None:
        """Pull, and report what became of it; never raises."""
        attempt = 0
        try:
            while True:
                try:
                    await self._attempt(attempt)
                    await self._merge()
                    break
                except PullError as error:
                    attempt += 1
                    rest = self.receiver.retries + 1 - attempt
                    if not error.again or not rest or time.monotonic() > self.deadline:
                        raise
                    log.warning("%s: %s; asking again (%d left)", self.name, error, rest)
                    self._part(last=False)
                    await self._settle(self.deadline - time.monotonic())
                    await asyncio.sleep(BACKOFF_S * attempt)
        except PullError as error:
            self.receiver.fail(self, str(error))
        except Exception as error:
            log.exception("%s: pulling failed", self.name)
            self.receiver.fail(self, f"{type(error).__name__}: {error}")
        self._part(last=True)
        await self._settle(None)
        self.receiver.finish(self)

    def _part(self, *, last: bool) -> None:
        """End what failed; if it was the last attempt, prefill may free the blocks."""
        for one in self.parting:
            self.settling[one] = asyncio.ensure_future(one.give_up(last=last))
        self.parting.clear()

    async def _settle(self, seconds: float | None) -> None:
        """Wait until no prefill rank can write to this request's blocks any more.

        Raises:
            PullError: Some still can after so many seconds.
        """
        if not self.settling:
            return
        doubtful = [one.rank for one in self.settling if one.doubtful]
        if doubtful and seconds is None:
            log.warning(
                "%s: prefill ranks %s may still be writing; its blocks are kept until they answer "
                "or are gone",
                self.name,
                doubtful,
            )
        _, pending = await asyncio.wait(self.settling.values(), timeout=seconds)
        if pending:
            raise PullError(f"prefill ranks {doubtful} stopped while they were writing")
        self.settling.clear()

    async def _attempt(self, attempt: int) -> None:
        receiver = self.receiver
        looking = receiver.agents(self.meta, fresh=attempt > 0)
        try:
            agents = await asyncio.wait_for(looking, max(0.0, self.deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise PullError("its bootstrap server gave no answer in time") from None
        prefill = receiver.side_of(len(agents))
        plan = kv_vllm_plan.plan_of(prefill, receiver.side, self.transfer)
        if isinstance(plan, Refusal):
            raise PullError(plan.sentence)
        self.plan, self.ratio = plan, plan.topology.ratio
        talks = []
        for rank, sends in kv_vllm_plan.asks(plan, receiver.worker.tp_rank).items():
            if rank not in self.done:
                ask = receiver.ask(self, rank, sends, len(agents), attempt)
                link = Link(receiver.worker.async_zmq_ctx, agents[rank])
                talks.append(Conversation(self, link, rank, ask))
        tasks = [asyncio.ensure_future(self._talk(one)) for one in talks]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in talks:
                if one.rank in self.done:
                    one.link.close()
                else:
                    self.parting.append(one)

    async def _talk(self, one: Conversation) -> None:
        try:
            await one.run(self.deadline)
        except PullError as error:
            raise PullError(f"{one.name}: {error}", again=error.again) from error
        self.done.add(one.rank)

    def meet(self, rank: int, told: dict[str, Any]) -> None:
        """A prefill rank says how its caches lie; the plan of both sides must be the same.

        Raises:
            PullError: It is not, or what it says cannot be read.
        """
        try:
            peer = kv_handshake.hear(told)
        except kv_handshake.HandshakeError as error:
            raise PullError(str(error)) from error
        plan = kv_vllm_plan.plan_of(peer.side, self.receiver.side, self.transfer)
        if isinstance(plan, Refusal):
            raise PullError(plan.sentence)
        self.receiver.greet(self.meta.remote_engine_id, peer)
        here = self.receiver.worker.tp_rank
        assert self.plan is not None
        if rank not in kv_vllm_plan.asks(plan, here):
            raise PullError(f"{plan.topology.ratio}: prefill rank {rank} was asked for nothing")
        self.plan, self.ratio = plan, plan.topology.ratio

    async def _merge(self) -> None:
        if self.plan is not None and self.blocks:
            await self.receiver.merge(self.plan, self.blocks)

    @property
    def name(self) -> str:
        """For messages: who pulls what from whom."""
        worker = self.receiver.worker
        return (
            f"kv pull of request {self.request}, {self.ratio or 'prefill not known yet'}, decode "
            f"rank {worker.tp_rank}, from prefill server {self.meta.remote_engine_id} "
            f"({self.meta.remote_bootstrap_addr})"
        )

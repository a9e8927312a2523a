"""The decode side of vLLM's Mooncake connector, 0.16 to 0.18: asks each prefill rank it needs.

A pull ends in a bounded time. What was not pulled is reported to vLLM, which fails the request or
computes it again (kv_load_failure_policy), at once; that its blocks may be given away is reported
when nobody can write to them any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import zmq

from ascend_patch.impl import (
    kv_handshake,
    kv_limits,
    kv_vllm_plan,
    kv_vllm_quarantine,
)
from ascend_patch.impl.kv_vllm_link import Link, LostError
from ascend_patch.impl.kv_vllm_talk import Conversation, PullError
from ascend_patch.impl.kv_vllm_wire import INTERNAL, log
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
        self.ratio, self.prefill_tp = "", 0
        # Those that failed, and of them those that are being ended.
        self.parting: list[Conversation] = []
        self.settling: dict[Conversation, asyncio.Future[None]] = {}

    async def run(self) -> None:
        """Pull, and report what became of it; never raises."""
        try:
            await self._run()
        except zmq.ContextTerminated:
            log.debug("%s: this server ends", self.name)
        finally:
            for one in (*self.parting, *self.settling):
                one.link.close()
            for task in self.settling.values():
                task.cancel()
            self.receiver.quarantine.leave(self)

    async def _run(self) -> None:
        attempt = 0
        try:
            refusal = self.receiver.quarantine.refusal()
            if refusal and self.blocks:
                raise PullError(refusal)
            self._check()
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
        except (PullError, kv_limits.LimitError) as error:
            self.receiver.fail(self, str(error))
        except zmq.ContextTerminated:
            raise
        except Exception:
            log.exception("%s: pulling failed", self.name)
            self.receiver.fail(self, INTERNAL)
        self._part(last=True)
        await self._keep()
        self.receiver.finish(self)

    def _check(self) -> None:
        """What clients of the proxy give.

        Raises:
            LimitError: It is not what it must be.
        """
        kv_limits.text("transfer_id", self.transfer)
        kv_limits.text("remote_engine_id", self.meta.remote_engine_id)
        kv_limits.url("remote_bootstrap_addr", self.meta.remote_bootstrap_addr)

    def _part(self, *, last: bool) -> None:
        """End what failed; if it was the last attempt, prefill may free the blocks."""
        for one in self.parting:
            self.settling[one] = asyncio.ensure_future(self._end(one, last))
        self.parting.clear()

    async def _end(self, one: Conversation, last: bool) -> None:
        """Until the peer is known to write no more, whatever it answers."""
        while True:
            try:
                await one.give_up(last=last)
                return
            except zmq.ContextTerminated:
                raise
            except Exception:
                log.exception("%s: %s cannot be asked whether it still writes", self.name, one.name)
                if not one.doubtful:
                    return
                await kv_vllm_quarantine.until_ended(one.has_ended)
                one.doubtful = False

    @property
    def doubtful(self) -> list[int]:
        """The prefill ranks that may be writing."""
        return [one.rank for one in self.settling if one.doubtful]

    async def _settle(self, seconds: float) -> None:
        """Wait until no prefill rank can write to this request's blocks any more.

        Raises:
            PullError: Some still can after so many seconds.
        """
        if not self.settling:
            return
        doubtful = self.doubtful
        _, pending = await asyncio.wait(self.settling.values(), timeout=max(0.0, seconds))
        if pending:
            raise PullError(f"prefill ranks {doubtful} stopped while they were writing")
        self._settled()

    async def _keep(self) -> None:
        """Wait for the same, however long it takes: the request has ended, its blocks are kept."""
        if not self.settling:
            return
        doubtful = self.doubtful
        if doubtful:
            log.warning(
                "%s: prefill ranks %s may still be writing; its blocks are kept until they answer "
                "or are gone",
                self.name,
                doubtful,
            )
            self.receiver.quarantine.enter(self, len(self.blocks))
        await asyncio.wait(self.settling.values())
        self._settled()

    def _settled(self) -> None:
        ended, self.settling = list(self.settling.values()), {}
        for task in ended:
            # It ends with an error only where this server ends.
            task.result()

    async def _attempt(self, attempt: int) -> None:
        receiver = self.receiver
        looking = receiver.agents(self.meta, fresh=attempt > 0)
        try:
            agents = await asyncio.wait_for(looking, max(0.0, self.deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise PullError("its bootstrap server gave no answer in time") from None
        self.prefill_tp = len(agents)
        prefill = receiver.side_of(self.prefill_tp)
        plan = kv_vllm_plan.plan_of(prefill, receiver.side, self.transfer)
        if isinstance(plan, Refusal):
            raise PullError(plan.sentence)
        self.plan, self.ratio = plan, plan.topology.ratio
        talks: list[Conversation] = []
        tasks: list[asyncio.Future[None]] = []
        try:
            for rank, sends in kv_vllm_plan.asks(plan, receiver.worker.tp_rank).items():
                if rank not in self.done:
                    ask = receiver.ask(self, rank, sends, len(agents), attempt)
                    talks.append(Conversation(self, self._link(rank, agents), rank, ask))
            tasks += [asyncio.ensure_future(self._talk(one)) for one in talks]
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in talks:
                # Who was not asked anything is not told that it is over.
                if one.rank in self.done or not tasks:
                    one.link.close()
                else:
                    self.parting.append(one)

    def _link(self, rank: int, agents: Mapping[int, str]) -> Link:
        try:
            return Link(self.receiver.worker.async_zmq_ctx, agents[rank])
        except (LostError, kv_limits.LimitError) as error:
            raise PullError(f"prefill rank {rank}: {error}", again=True) from error
        except KeyError:
            raise PullError(
                f"the bootstrap server knows no prefill rank {rank}, but {len(agents)} others",
                again=True,
            ) from None

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
        if peer.side.tp != self.prefill_tp:
            raise PullError(
                f"{plan.topology.ratio}: the bootstrap server names {self.prefill_tp} ranks of "
                "this prefill server; some of them may not have registered yet",
                again=True,
            )
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

"""The decode side of vLLM's Mooncake connector, 0.16 to 0.18: asks each prefill rank it needs.

A pull ends in a bounded time. What was not pulled is reported to vLLM, which fails the request or
computes it again (kv_load_failure_policy), at once; that its blocks may be given away is reported
when nobody can write to them any more.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ascend_patch.impl import kv_handshake, kv_vllm_plan, kv_vllm_wire
from ascend_patch.impl.kv_vllm_link import Link, LostError
from ascend_patch.impl.kv_vllm_wire import ACCEPTED, CANCEL, DONE, FAILED, GO, READY, Ask, log
from ascend_patch.kernels.kv_layout import Plan, Refusal

REPEAT_S = 2.0
# After a peer is gone: what it had written to a socket may still be read from it.
SETTLE_S = 2.0
BACKOFF_S = 0.5


class PullError(Exception):
    """A pull, or an attempt of it, that failed; `again` if another attempt may not."""

    def __init__(self, sentence: str, *, again: bool = False) -> None:
        super().__init__(sentence)
        self.again = again


class Conversation:
    """One attempt with one prefill rank.

    Attributes:
        told: What the peer says of itself; None if it has no ascend_patch, or is not heard yet.
        doubtful: It may be writing.
    """

    def __init__(self, pull: Any, link: Link, rank: int, ask: Ask) -> None:
        self.pull, self.link, self.rank, self.ask = pull, link, rank, ask
        self.told: dict[str, Any] | None = None
        # An unpatched peer does not ask before it writes.
        self.doubtful = bool(ask.remote_hostname and pull.blocks)
        self.pushed = asyncio.Event()

    async def run(self, deadline: float) -> None:
        """Until the peer has pushed.

        Raises:
            PullError: It has not, and may have written if `doubtful` says so.
        """
        message = self.ask
        await self.link.send(message)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PullError(f"there was no answer within {self.pull.receiver.timeout:g} s")
            try:
                answer = await self.link.answer(min(left, self.pull.receiver.repeat))
            except LostError as error:
                raise PullError(str(error), again=True) from error
            if answer is None:
                # An unpatched peer would take it for a second request; it is asked once.
                if self.told is not None or not self.ask.remote_hostname:
                    await self.link.send(message)
                continue
            state = self._hear(answer)
            if state == READY:
                message = self._message(GO)
                self.doubtful = True
                await self.link.send(message)
            elif state == DONE:
                self.doubtful = False
                return

    def _hear(self, answer: kv_vllm_wire.Answer) -> str:
        ours = answer.ascend_patch
        if ours is None:
            return self._hear_unpatched(answer)
        if ours.get("epoch") != self.ask.ascend_patch["epoch"]:  # type: ignore[index]
            return ""
        if self.told is None:
            # It asks before it writes.
            self.doubtful = False
            self.told = ours
            self.pull.meet(self.rank, ours)
        elif ours.get("nonce") != self.told.get("nonce"):
            self.doubtful = False
            raise PullError("the prefill server was restarted meanwhile", again=True)
        state = str(ours.get("state"))
        if state == FAILED:
            self.doubtful = False
            raise PullError(str(answer.err_msg), again=bool(ours.get("again")))
        return state

    def _hear_unpatched(self, answer: kv_vllm_wire.Answer) -> str:
        if not self.ask.remote_hostname:
            raise PullError(kv_handshake.both_sides(self.pull.ratio, "prefill"))
        if answer.status == kv_vllm_wire.ERROR or answer.err_reqs:
            self.doubtful = False
            raise PullError(answer.err_msg or "the prefill server reports an error")
        if self.pull.request in (answer.ok_reqs or ()):
            return DONE
        if answer.status == kv_vllm_wire.FINISH:
            self.doubtful = False
            raise PullError("the prefill server ended without sending it")
        return ACCEPTED

    def _message(self, kind: str) -> Ask:
        given = self.ask.ascend_patch or {}
        return Ask(
            req_blocks=self.ask.req_blocks,
            remote_tp_rank=self.ask.remote_tp_rank,
            ascend_patch={
                "protocol": given.get("protocol"),
                "kind": kind,
                "epoch": given.get("epoch"),
                "transfer": self.pull.transfer,
                "rank": self.ask.remote_tp_rank,
            },
        )

    async def give_up(self, *, last: bool) -> None:
        """Tell the peer, wait until it writes no more, and hang up.

        Args:
            last: Nobody asks again: it may free its blocks.
        """
        try:
            message = self._message(CANCEL)
            message.ascend_patch |= {"last": last}  # type: ignore[operator]
            await self.link.send(message)
            while self.doubtful:
                answer = await self.link.answer(REPEAT_S)
                if answer is not None:
                    self.doubtful = self._still_writes(answer)
        except LostError:
            if self.doubtful:
                await asyncio.sleep(SETTLE_S)
        finally:
            self.link.close()

    def _still_writes(self, answer: kv_vllm_wire.Answer) -> bool:
        try:
            return self._hear(answer) != DONE and self.doubtful
        except PullError:
            return self.doubtful


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
            raise PullError(
                f"prefill rank {one.rank} at {one.link.address}: {error}", again=error.again
            ) from error
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

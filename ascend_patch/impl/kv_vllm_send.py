"""The prefill side of vLLM's Mooncake connector, 0.16 to 0.18: pushes to any decode TP.

Everything here runs in the worker's sender loop, so nothing is locked. A request is served when
each decode rank of the plan has been pushed to, or has given up: then its blocks are freed, once.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ascend_patch.impl import (
    kv_handshake,
    kv_limits,
    kv_vllm_plan,
    kv_vllm_push,
    kv_vllm_requests,
    kv_vllm_wire,
)
from ascend_patch.impl.kv_vllm_push import Push, Pusher
from ascend_patch.impl.kv_vllm_records import Records
from ascend_patch.impl.kv_vllm_requests import Job, PushError, Question, Record
from ascend_patch.impl.kv_vllm_wait import EXPIRED, EventWaiter
from ascend_patch.impl.kv_vllm_wire import (
    ACCEPTED,
    ASK,
    CANCEL,
    DONE,
    FAILED,
    GO,
    INTERNAL,
    READY,
    RESTARTED,
    answer_of,
    log,
)
from ascend_patch.kernels.kv_layout import Plan, Side

# How many attempts may be under way; and how many are remembered after they ended, and requests
# after their blocks were freed, so that a late message about one gets a true answer.
REMEMBERED = 4096


class Sender:
    """One prefill rank's part of the transfers; `worker` is the host's MooncakeConnectorWorker.

    Its `jobs` are attempts by epoch, its `records` requests by transfer id; see `kv_vllm_records`.
    """

    def __init__(
        self,
        worker: Any,
        side: Side,
        model: str,
        *,
        timeout: float,
        new_request: Callable[[str], Any],
        views: Sequence[Any],
    ) -> None:
        self.worker, self.side = worker, side
        self.pusher = Pusher(worker, views)
        self.nonce = uuid.uuid4().hex
        self.said = kv_handshake.say(side, model) | {"nonce": self.nonce}
        self.new_request = new_request
        self.memory = Records(worker.reqs_need_send, REMEMBERED)
        self.waiter = EventWaiter(worker, timeout)
        self.jobs, self.records = self.memory.jobs, self.memory.requests

    async def handle(self, identity: bytes, socket: Any, ask: Any) -> None:
        """Take one message of a patched decode rank; it returns at once.

        Raises:
            LimitError: It says nothing that can be answered.
        """
        ours = ask.ascend_patch
        epoch = kv_limits.text("epoch", ours.get("epoch"))
        kind = kv_limits.text("kind", ours.get("kind"))
        job = self.jobs.get(epoch)
        if job is not None:
            job.identity, job.socket = identity, socket
        if kind == CANCEL:
            await self._cancel(job, ours)
        elif kind == GO:
            refusal = self._refuse_go(job, ours)
            if refusal:
                await self._refuse(identity, socket, ask, refusal, again=True)
            elif job is not None and job.state == READY:
                job.go.set()
            elif job is not None:
                await self._repeat(job)
        elif kind != ASK:
            raise kv_limits.LimitError(f"kind is {kind!r}; it must be {ASK}, {GO} or {CANCEL}")
        elif job is None:
            await self._begin(epoch, identity, socket, ask)
        else:
            log.debug("%s: asked again; answering again", job.name)
            await self._repeat(job)

    def _refuse_go(self, job: Job | None, ours: dict[str, Any]) -> str:
        """Why nothing is written although a decode rank allows it; empty if there is no reason.

        Only attempts that ended are forgotten. So an attempt that is not known here has ended, or
        was accepted by another process: that one's nonce comes with the message, except from
        ascend-patch 0.1.0.
        """
        if ours.get("nonce", self.nonce) != self.nonce:
            return RESTARTED
        if job is None or ours.get("job", job.number) != job.number:
            return "this attempt has ended, and is not remembered any more"
        return ""

    async def _begin(self, epoch: str, identity: bytes, socket: Any, ask: Any) -> None:
        """Accept an attempt, or say why not and keep nothing of it."""
        try:
            question = kv_vllm_requests.read_question(ask)
            plan = kv_vllm_requests.plan_for(self.side, self.worker.tp_rank, question)
            record = self.memory.admit(question)
        except (kv_limits.LimitError, kv_handshake.HandshakeError, PushError) as error:
            again = getattr(error, "again", False)
            await self._refuse(identity, socket, ask, str(error), again)
            return
        record.puller = question.puller
        record.expected = kv_vllm_plan.asked_by(plan, self.worker.tp_rank)
        name = kv_vllm_requests.name_of(self.side, self.worker.tp_rank, question)
        job = self.memory.begin(epoch, identity, socket, name, question)
        # The loop keeps no strong reference to a task.
        job.task = asyncio.ensure_future(self._run(job, question, plan, record))

    async def _run(self, job: Job, question: Question, plan: Plan, record: Record) -> None:
        try:
            await self._tell(job, ACCEPTED)
            await self._serve(job, question, plan, record)
            await self._tell(job, DONE)
        except PushError as error:
            await self._tell(job, FAILED, str(error), error.again)
        except Exception:
            log.exception("%s: pushing failed", job.name)
            await self._tell(job, FAILED, INTERNAL)
        finally:
            # A cancelled task keeps its frames, and they what the attempt asked for.
            job.task = None
        if job.cancelled:
            self.serve(job.transfer, job.rank, job.state == DONE)

    async def _serve(self, job: Job, question: Question, plan: Plan, record: Record) -> None:
        transfer, rank = job.transfer, job.rank
        before, record.jobs[rank] = record.jobs.get(rank), job
        if before is not None:
            await self._stop(before, last=False)
        # A cancelled task keeps its frames, and so would each attempt all that were before it.
        del before
        if record.served.get(rank):
            if record.wrote.get(rank) == question.digest:
                return  # The answer to its last attempt was lost; what it asked for lies there.
            raise PushError(record.gone or "this decode rank has had it, at another place")
        send = await self._ready(job, record)
        if question.blocks:
            await self._tell(job, READY)
            await self.waiter.wait(job.go, job, record)
            await self._push(job, question, plan, send)
        record.wrote[rank] = question.digest
        self.serve(transfer, rank, True)

    async def _ready(self, job: Job, record: Record) -> Any:
        """The host's record of a request, once its blocks are computed."""
        requests, transfer = self.worker.reqs_need_send, job.transfer
        if transfer not in requests and not (record.gone or record.known):
            # Decode may ask before the request comes; then the host finds what we make here.
            requests[transfer] = self.new_request(transfer)
        send = requests.get(transfer)
        if send is not None:
            await self.waiter.wait(send.ready, job, record)
        if transfer not in requests:
            raise PushError(record.gone or EXPIRED)
        return send

    async def _push(self, job: Job, question: Question, plan: Plan, send: Any) -> None:
        if send.transfer_id not in self.worker.reqs_need_send:
            raise PushError(EXPIRED)
        began = time.perf_counter()
        # Marks it as not to be freed by the host's time-out.
        send.sending += 1
        try:
            pairs = kv_vllm_push.pairs_of(
                plan,
                send.local_block_ids,
                question.blocks,
                tokens=question.tokens,
                cached_blocks=question.cached_blocks,
            )
            one = Push(plan, self.worker.tp_rank, job.rank, pairs, question.session, question.bases)
            code, written = await asyncio.get_running_loop().run_in_executor(
                self.worker._sender_executor, self.pusher.push, one, question.num_blocks
            )
        except (ValueError, kv_vllm_push.StagingError) as error:
            raise PushError(f"{plan.topology.ratio}: {error}") from error
        finally:
            send.sending -= 1
        if code != 0:
            raise PushError(f"Mooncake's transfer engine returned {code}", again=True)
        seconds = time.perf_counter() - began
        log.debug("%s: %d bytes in %.3f s", job.name, written, seconds)

    def serve(self, transfer: str, rank: int, pushed: bool) -> None:
        """Note that a decode rank needs no more; after the last one the blocks are freed."""
        record = self.memory.request(transfer)
        record.served[rank] = record.served.get(rank, False) or pushed
        self.settle(transfer)

    def settle(self, transfer: str) -> None:
        """Free a request's blocks if all decode ranks were heard of, and it is finished here."""
        record = self.records.get(transfer)
        send = self.worker.reqs_need_send.get(transfer)
        if record is None or send is None or not record.expected or not send.ready.is_set():
            return
        if set(record.expected) <= record.served.keys() and not send.sending:
            del self.worker.reqs_need_send[transfer]
            record.gone = "its blocks were freed, because every decode rank had been served"
            self.worker.finished_sending_reqs.add(send.p_req_id)

    async def _cancel(self, job: Job | None, ours: dict[str, Any]) -> None:
        transfer = kv_limits.text("the transfer id", ours.get("transfer"))
        rank = kv_limits.rank("rank", ours.get("rank"), kv_limits.MAX_TP)
        last = kv_limits.flag("last", ours.get("last"))
        if job is not None:
            if (transfer, rank) != (job.transfer, job.rank):
                raise kv_limits.LimitError(
                    f"the attempt is of transfer {job.transfer} and decode rank {job.rank}, and "
                    f"what is cancelled of {transfer} and {rank}; they must be the same"
                )
            self._log(job, logging.INFO, f"given up by the decode rank{'' if last else ' so far'}")
            await self._stop(job, last=last)
        # Who cancels what nobody has heard of leaves nothing behind.
        if last and transfer in self.records and (job is None or not job.writing):
            self.serve(transfer, rank, False)

    async def _stop(self, job: Job, *, last: bool) -> None:
        """End an attempt, unless it writes; who asks about it later hears that it is over."""
        writes = job.writing
        job.stop(last=last)
        if not writes and job.state not in (DONE, FAILED):
            self._note(job, FAILED, "the decode rank gave this attempt up")
            await self._repeat(job)

    def know(self, transfer: str) -> None:
        """The host has this request: once it is gone, it does not come again."""
        self.memory.request(transfer).known = True

    def abort(self, transfer: str, why: str) -> None:
        """A request that ended here without anything to send: who waits for it is told at once."""
        self.memory.request(transfer).gone = why

    async def _tell(self, job: Job, state: str, sentence: str = "", again: bool = False) -> None:
        self._note(job, state, sentence, again)
        if state == FAILED:
            self._log(job, logging.WARNING, f"not pushed: {sentence}")
        await self._repeat(job)

    def _note(self, job: Job, state: str, sentence: str = "", again: bool = False) -> None:
        if job.ended:
            return
        job.state = state
        job.told = answer_of(
            self.said, job.epoch, state, [job.request], sentence, again=again, job=job.number
        )
        if job.ended:
            self.memory.end(job)

    async def _refuse(
        self, identity: bytes, socket: Any, ask: Any, sentence: str, again: bool = False
    ) -> None:
        """Say that nothing is written for an attempt of which nothing is kept."""
        kv_vllm_wire.log_refusal(f"kv push, prefill rank {self.worker.tp_rank}: {sentence}")
        requests = [one for one in list(ask.req_blocks)[:1] if len(one) <= kv_limits.MAX_ID]
        epoch = ask.ascend_patch["epoch"]
        answer = answer_of(self.said, epoch, FAILED, requests, sentence, again=again)
        await socket.send_multipart((identity, kv_vllm_wire.encode(answer)))

    async def _repeat(self, job: Job) -> None:
        if job.told is not None:
            await job.socket.send_multipart((job.identity, kv_vllm_wire.encode(job.told)))

    def _log(self, job: Job, level: int, sentence: str) -> None:
        # Anybody may ask for a request that is not here, as often as they like.
        if self.memory.knows(job.transfer):
            log.log(level, "%s: %s", job.name, sentence)
        else:
            kv_vllm_wire.log_refusal(f"{job.name}: {sentence}")

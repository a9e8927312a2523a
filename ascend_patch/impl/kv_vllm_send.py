"""The prefill side of vLLM's Mooncake connector, 0.16 to 0.18: pushes to any decode TP.

Everything here runs in the worker's sender loop, so nothing is locked. A request is served when
each decode rank of the plan has been pushed to, or has given up: then its blocks are freed, once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from ascend_patch.impl import kv_handshake, kv_vllm_plan, kv_vllm_push, kv_vllm_wire
from ascend_patch.impl.kv_vllm_push import Push, Pusher
from ascend_patch.impl.kv_vllm_requests import Job, PushError, Record
from ascend_patch.impl.kv_vllm_wire import ACCEPTED, CANCEL, DONE, FAILED, GO, READY, Answer, log
from ascend_patch.kernels.kv_layout import Plan, Refusal, Side, Topology

# How many requests are remembered after their blocks were freed, so that a late message about one
# gets a true answer.
REMEMBERED = 4096
POLL_S = 1.0


class Sender:
    """One prefill rank's part of the transfers; `worker` is the host's MooncakeConnectorWorker."""

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
        self.worker, self.side, self.timeout = worker, side, timeout
        self.pusher = Pusher(worker, views)
        self.said = kv_handshake.say(side, model) | {"nonce": uuid.uuid4().hex}
        self.new_request = new_request
        self.records: OrderedDict[str, Record] = OrderedDict()
        self.jobs: OrderedDict[str, Job] = OrderedDict()

    async def handle(self, identity: bytes, socket: Any, ask: Any) -> None:
        """Take one message of a patched decode rank; it returns at once."""
        ours = ask.ascend_patch
        epoch, kind = str(ours.get("epoch")), ours.get("kind")
        job = self.jobs.get(epoch)
        if job is not None:
            job.identity, job.socket = identity, socket
        if kind == CANCEL:
            await self._cancel(job, ours)
        elif kind == GO:
            if job is None:
                job = Job(epoch, identity, socket, ask)
                await self._tell(job, FAILED, "this prefill server was restarted meanwhile", True)
            elif job.state == READY:
                job.go.set()
            else:
                await self._repeat(job)
        elif job is None:
            job = self.jobs[epoch] = Job(epoch, identity, socket, ask)
            # The loop keeps no strong reference to a task.
            job.task = asyncio.ensure_future(self._run(job))
            self._forget()
        else:
            log.debug("%s: asked again; answering again", self._name(job))
            await self._repeat(job)

    async def _run(self, job: Job) -> None:
        try:
            peer = self._hear(job)
            await self._tell(job, ACCEPTED)
            await self._serve(job, peer.side)
            await self._tell(job, DONE)
        except PushError as error:
            await self._tell(job, FAILED, str(error), error.again)
        except Exception as error:
            log.exception("%s: pushing failed", self._name(job))
            await self._tell(job, FAILED, f"{type(error).__name__}: {error}")
        if job.cancelled:
            for transfer, _ in job.ask.req_blocks.values():
                self.serve(transfer, self._rank(job), job.state == DONE)

    def _hear(self, job: Job) -> kv_handshake.Peer:
        try:
            return kv_handshake.hear(job.ask.ascend_patch)
        except kv_handshake.HandshakeError as error:
            raise PushError(str(error)) from error

    async def _serve(self, job: Job, decode: Side) -> None:
        (request, (transfer, blocks)), rank = (
            next(iter(job.ask.req_blocks.items())),
            self._rank(job),
        )
        plan = self._plan(job, decode, transfer)
        record = self.records.setdefault(transfer, Record())
        self.records.move_to_end(transfer)
        record.puller = record.puller or job.ask.ascend_patch["puller"]
        if record.puller != job.ask.ascend_patch["puller"]:
            raise PushError(f"transfer {transfer} belongs to decode server {record.puller}")
        record.expected = self._expected(plan)
        before, record.jobs[rank] = record.jobs.get(rank), job
        if before is not None:
            await self._stop(before, last=False)
        if record.served.get(rank):
            return  # The answer to its last attempt was lost; what it asked for lies there.
        send = await self._ready(transfer, record)
        if blocks:
            await self._tell(job, READY)
            await self._wait_for(job.go, transfer, record)
            await self._push(job, plan, send, request, blocks)
        self.serve(transfer, rank, True)

    def _plan(self, job: Job, decode: Side, transfer: str) -> Plan:
        believed = job.ask.ascend_patch.get("prefill_tp")
        ratio = Topology(self.side, decode).ratio
        if believed != self.side.tp:
            raise PushError(
                f"{ratio}: the decode server believes that this one has TP {believed}", again=True
            )
        plan = kv_vllm_plan.plan_of(self.side, decode, transfer)
        if isinstance(plan, Refusal):
            raise PushError(plan.sentence)
        if self._rank(job) not in kv_vllm_plan.asked_by(plan, self.worker.tp_rank):
            raise PushError(
                f"{ratio}: prefill rank {self.worker.tp_rank} has nothing for decode rank "
                f"{self._rank(job)}; install the same ascend-patch on both sides"
            )
        return plan

    async def _ready(self, transfer: str, record: Record) -> Any:
        """The host's record of a request, once its blocks are computed."""
        requests = self.worker.reqs_need_send
        if transfer not in requests and not (record.gone or record.known):
            # Decode may ask before the request comes; then the host finds what we make here.
            requests[transfer] = self.new_request(transfer)
        send = requests.get(transfer)
        if send is not None:
            await self._wait_for(send.ready, transfer, record)
        if transfer not in requests:
            raise PushError(record.gone or "its blocks were freed, because nobody fetched them")
        return send

    async def _wait_for(self, event: asyncio.Event, transfer: str, record: Record) -> None:
        deadline = time.monotonic() + self.timeout
        while not event.is_set():
            if record.gone or transfer not in self.worker.reqs_need_send:
                raise PushError(record.gone or "its blocks were freed, because nobody fetched them")
            if time.monotonic() > deadline:
                raise PushError(f"nothing happened for {self.timeout:.0f} s")
            try:
                await asyncio.wait_for(event.wait(), POLL_S)
            except asyncio.TimeoutError:
                continue

    async def _push(self, job: Job, plan: Plan, send: Any, request: str, blocks: list[int]) -> None:
        if send.transfer_id not in self.worker.reqs_need_send:
            raise PushError("its blocks were freed, because nobody fetched them")
        ours = job.ask.ascend_patch
        rank, began = self._rank(job), time.perf_counter()
        # Marks it as not to be freed by the host's time-out.
        send.sending += 1
        try:
            pairs = kv_vllm_push.pairs_of(
                plan,
                send.local_block_ids,
                blocks,
                tokens=ours.get("tokens"),
                cached_blocks=ours.get("cached_blocks"),
            )
            session = f"{ours['hostname']}:{job.ask.remote_port}"
            bases = job.ask.kv_caches_base_addr
            one = Push(plan, self.worker.tp_rank, rank, pairs, session, bases)
            code, written = await asyncio.get_running_loop().run_in_executor(
                self.worker._sender_executor, self.pusher.push, one, ours.get("num_blocks")
            )
        except ValueError as error:
            raise PushError(f"{plan.topology.ratio}: {error}") from error
        finally:
            send.sending -= 1
        if code != 0:
            raise PushError(f"Mooncake's transfer engine returned {code}", again=True)
        seconds = time.perf_counter() - began
        log.debug("%s: %d bytes of %s in %.3f s", self._name(job), written, request, seconds)

    def serve(self, transfer: str, rank: int, pushed: bool) -> None:
        """Note that a decode rank needs no more; after the last one the blocks are freed."""
        record = self.records.setdefault(transfer, Record())
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
        transfer, rank = ours.get("transfer"), ours.get("rank")
        if not isinstance(transfer, str) or not isinstance(rank, int):
            return
        last = bool(ours.get("last"))
        if job is not None:
            log.info(
                "%s: given up by the decode rank%s", self._name(job), "" if last else " so far"
            )
            await self._stop(job, last=last)
        if last and (job is None or not job.writing):
            if job is not None:
                self._expect(job, transfer)
            self.serve(transfer, rank, False)

    def _expect(self, job: Job, transfer: str) -> None:
        """Learn who is to be heard of, from an attempt that may have ended before it began.

        A rank that was stopped hears the question and its withdrawal at once.
        """
        record = self.records.setdefault(transfer, Record())
        if record.expected:
            return
        try:
            plan = self._plan(job, self._hear(job).side, transfer)
        except PushError as error:
            log.warning("%s: its blocks are kept until they expire: %s", self._name(job), error)
            return
        record.expected = self._expected(plan)

    def _expected(self, plan: Plan) -> tuple[int, ...]:
        return kv_vllm_plan.asked_by(plan, self.worker.tp_rank)

    async def _stop(self, job: Job, *, last: bool) -> None:
        """End an attempt, unless it writes; who asks about it later hears that it is over."""
        writes = job.writing
        job.stop(last=last)
        if not writes and job.state not in (DONE, FAILED):
            self._note(job, FAILED, "the decode rank gave this attempt up")
            await self._repeat(job)

    def know(self, transfer: str) -> None:
        """The host has this request: once it is gone, it does not come again."""
        self.records.setdefault(transfer, Record()).known = True

    def abort(self, transfer: str, why: str) -> None:
        """A request that ended here without anything to send: who waits for it is told at once."""
        record = self.records.setdefault(transfer, Record())
        record.gone = why

    async def _tell(self, job: Job, state: str, sentence: str = "", again: bool = False) -> None:
        self._note(job, state, sentence, again)
        if state == FAILED:
            log.warning("%s: not pushed: %s", self._name(job), sentence)
        await self._repeat(job)

    def _note(self, job: Job, state: str, sentence: str = "", again: bool = False) -> None:
        job.state = state
        requests = list(job.ask.req_blocks)
        status = {ACCEPTED: kv_vllm_wire.CONTINUE, READY: kv_vllm_wire.CONTINUE}.get(state, 0)
        extra = self.said | {"epoch": job.epoch, "state": state, "again": again}
        job.told = Answer(
            status=status,
            ok_reqs=requests if state == DONE else None,
            err_reqs=requests if state == FAILED else None,
            err_msg=sentence or None,
            ascend_patch=extra,
        )

    async def _repeat(self, job: Job) -> None:
        if job.told is not None:
            await job.socket.send_multipart((job.identity, kv_vllm_wire.encode(job.told)))

    def _forget(self) -> None:
        for kept in (self.jobs, self.records):
            while len(kept) > REMEMBERED:
                kept.popitem(last=False)

    def _rank(self, job: Job) -> int:
        rank: int = job.ask.remote_tp_rank
        return rank

    def _name(self, job: Job) -> str:
        ours = job.ask.ascend_patch or {}
        return (
            f"kv push, prefill rank {self.worker.tp_rank} (TP {self.side.tp}) -> decode rank "
            f"{self._rank(job)} (TP {job.ask.remote_tp_size}) of {ours.get('puller', '?')}, "
            f"requests {list(job.ask.req_blocks)}"
        )

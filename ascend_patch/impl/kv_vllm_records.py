"""Which attempts and requests a prefill rank remembers: all that are not over, and the last others.

Only what has ended is forgotten. Where all that fit are under way, a new one is not admitted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import MutableMapping
from itertools import count
from typing import Any

from ascend_patch.impl.kv_vllm_requests import Job, PushError, Question, Record

# Block ids of attempts whose requests the host does not know yet: 8 MiB.
AHEAD = 1 << 21


class Records:
    """What a prefill rank knows of attempts and requests.

    Args:
        waiting: The host's requests that may be sent, by transfer id: `reqs_need_send`.
        most: How many attempts may be under way, how many are remembered after they ended, and how
            many requests that are over.

    Attributes:
        jobs: Attempts by epoch: those that have not ended, and the last `most` that have.
        requests: By transfer id: those that are not over, and the last that are.
    """

    def __init__(self, waiting: MutableMapping[str, Any], most: int) -> None:
        self._most = most
        self.jobs: dict[str, Job] = {}
        self.requests: OrderedDict[str, Record] = OrderedDict()
        self._waiting = waiting
        self._ended: deque[str] = deque()
        # Epoch -> the number of its blocks, and their sum.
        self._ahead: dict[str, int] = {}
        self._blocks_ahead = 0
        self._numbers = count(1)

    def admit(self, question: Question) -> Record:
        """The record of a request that may be pushed.

        Raises:
            PushError: It belongs to another decode server, or there are too many.
        """
        record = self.requests.get(question.transfer)
        if record is not None and record.puller not in ("", question.puller):
            raise PushError(f"transfer {question.transfer} belongs to another decode server")
        if len(self.jobs) - len(self._ended) >= self._most:
            raise PushError(
                f"{self._most} transfers from this prefill rank are under way; ask again later",
                again=True,
            )
        if not self.knows(question.transfer):
            ahead = self._blocks_ahead + len(question.blocks)
            if ahead > AHEAD:
                raise PushError(
                    f"decode ranks wait for {ahead} blocks of requests that this prefill server "
                    f"does not know yet; {AHEAD} fit: ask again later",
                    again=True,
                )
        return self.request(question.transfer)

    def knows(self, transfer: str) -> bool:
        """Whether the host has had this request."""
        record = self.requests.get(transfer)
        return record is not None and record.known

    def request(self, transfer: str) -> Record:
        """What is known of a request, from now on."""
        record = self.requests.setdefault(transfer, Record())
        self.requests.move_to_end(transfer)
        # A few at a time: those that are not over are passed by.
        for _ in range(8):
            if len(self.requests) <= self._most:
                break
            oldest, found = self.requests.popitem(last=False)
            if found.running or oldest in self._waiting or oldest == transfer:
                self.requests[oldest] = found
        return record

    def begin(self, epoch: str, identity: bytes, socket: Any, name: str, asked: Question) -> Job:
        """An attempt that was admitted is under way."""
        job = self.jobs[epoch] = Job(
            epoch,
            next(self._numbers),
            identity,
            socket,
            name,
            asked.request,
            asked.transfer,
            asked.rank,
        )
        record = self.requests[asked.transfer]
        record.running += 1
        if not record.known:
            self._ahead[epoch] = len(asked.blocks)
            self._blocks_ahead += len(asked.blocks)
        return job

    def end(self, job: Job) -> None:
        """Keep of an attempt what a late message about it needs."""
        self._blocks_ahead -= self._ahead.pop(job.epoch, 0)
        self._ended.append(job.epoch)
        while len(self._ended) > self._most:
            self.jobs.pop(self._ended.popleft(), None)
        record = self.requests[job.transfer]
        record.running -= 1
        if not record.running and not record.known:
            # Made for attempts alone: the host makes another when the request comes.
            self._waiting.pop(job.transfer, None)

"""What a prefill rank knows of the requests that it pushes, and of who asked for them."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ascend_patch.impl import kv_handshake, kv_limits, kv_vllm_plan
from ascend_patch.impl.kv_vllm_wire import DONE, FAILED, READY, Ask
from ascend_patch.kernels.kv_layout import Plan, Refusal, Side, Topology


class PushError(Exception):
    """A request that is not pushed; `again` if asking again may help."""

    def __init__(self, sentence: str, *, again: bool = False) -> None:
        super().__init__(sentence)
        self.again = again


@dataclass(frozen=True)
class Question:
    """What a decode rank asks for, with every value checked.

    Attributes:
        request: The decode server's name of the request; `transfer` is the one of both servers.
        blocks: Ids of its blocks, below `num_blocks`; none if prefill is only to free its own.
        rank: Of the decode server, whose size is `side.tp`.
        puller: The decode server's engine id.
        session: The decode rank's transfer engine, host:port.
        bases: Addresses of its regions.
        prefill_tp: What it believes of this side.
    """

    request: str
    transfer: str
    blocks: Sequence[int]
    rank: int
    side: Side
    puller: str
    session: str
    bases: Sequence[int]
    num_blocks: int
    tokens: int | None
    cached_blocks: int | None
    prefill_tp: int

    @property
    def digest(self) -> bytes:
        """Tells where it wants its bytes: the same for attempts of one request alone."""
        where = f"{self.request} {self.session} {list(self.bases)} ".encode()
        return hashlib.blake2b(where + array("q", self.blocks).tobytes(), digest_size=16).digest()


def read_question(ask: Ask) -> Question:
    """Check a message in which a patched decode rank asks for a request.

    Raises:
        LimitError: A value is out of range.
        HandshakeError: It does not say how its caches lie.
    """
    ours = ask.ascend_patch or {}
    side = kv_handshake.hear(ours).side
    kv_limits.whole("remote_tp_size", ask.remote_tp_size, side.tp, side.tp)
    rank = kv_limits.rank("remote_tp_rank", ask.remote_tp_rank, side.tp)
    num_blocks = kv_limits.whole("num_blocks", ours.get("num_blocks"), 1, kv_limits.MAX_NUM_BLOCKS)
    kv_limits.whole("the number of requests", len(ask.req_blocks), 1, 1)
    ((request, (transfer, blocks)),) = ask.req_blocks.items()
    sizes = [size * num_blocks for size in side.regions(rank)]
    bases = kv_limits.addresses("kv_caches_base_addr", ask.kv_caches_base_addr, sizes)
    tokens, cached = ours.get("tokens"), ours.get("cached_blocks")
    return Question(
        request=kv_limits.text("the request id", request),
        transfer=kv_limits.text("the transfer id", transfer),
        blocks=array("i", kv_limits.block_ids("the list of blocks", blocks, num_blocks)),
        rank=rank,
        side=side,
        puller=kv_limits.text("puller", ours.get("puller")),
        session=kv_limits.session(
            kv_limits.host_name("hostname", ours.get("hostname")),
            kv_limits.port("remote_port", ask.remote_port),
        ),
        bases=array("q", bases),
        num_blocks=num_blocks,
        tokens=kv_limits.optional("tokens", tokens, 0, kv_limits.MAX_TOKENS),
        cached_blocks=kv_limits.optional("cached_blocks", cached, 0, kv_limits.MAX_TOKENS),
        prefill_tp=kv_limits.whole("prefill_tp", ours.get("prefill_tp"), 1, kv_limits.MAX_TP),
    )


def plan_for(side: Side, rank: int, question: Question) -> Plan:
    """How a request comes from a prefill rank to the decode rank that asks.

    Args:
        side: The prefill server's.

    Raises:
        PushError: It cannot.
    """
    ratio = Topology(side, question.side).ratio
    if question.prefill_tp != side.tp:
        raise PushError(
            f"{ratio}: the decode server believes that this one has TP {question.prefill_tp}",
            again=True,
        )
    plan = kv_vllm_plan.plan_of(side, question.side, question.transfer)
    if isinstance(plan, Refusal):
        raise PushError(plan.sentence)
    if question.rank not in kv_vllm_plan.asked_by(plan, rank):
        raise PushError(
            f"{ratio}: prefill rank {rank} has nothing for decode rank {question.rank}; install "
            "the same ascend-patch on both sides"
        )
    return plan


def name_of(side: Side, rank: int, question: Question) -> str:
    """A push from a prefill rank, for messages; `side` is the prefill server's."""
    return (
        f"kv push, prefill rank {rank} (TP {side.tp}) -> decode rank {question.rank} "
        f"(TP {question.side.tp}) of {question.puller}, requests {[question.request]}"
    )


@dataclass
class Job:
    """One attempt of a decode rank.

    Attributes:
        number: Of this job in its process. An epoch that is asked for again after it was forgotten
            gets another one.
        name: For messages.
        given_up: Nothing may be written for it any more.
    """

    epoch: str
    number: int
    identity: bytes
    socket: Any
    name: str
    request: str
    transfer: str
    rank: int
    state: str = ""
    told: Any = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    task: Any = None
    cancelled: bool = False
    given_up: bool = False

    @property
    def writing(self) -> bool:
        """Whether bytes may be on their way."""
        return self.state == READY and self.go.is_set()

    @property
    def ended(self) -> bool:
        """Nothing is written for it, and nothing will be."""
        return self.state in (DONE, FAILED)

    def stop(self, *, last: bool) -> None:
        """Give it up, unless it writes: then its end is waited for.

        Args:
            last: Its decode rank asks no more.
        """
        self.cancelled = last
        if self.task is not None and not self.writing:
            # A task may swallow its cancellation where what it waited for came at the same time.
            self.given_up = True
            self.task.cancel()


@dataclass
class Record:
    """What became of a request.

    Attributes:
        puller: The decode engine that it belongs to.
        expected: The decode ranks that are heard of before its blocks are freed.
        served: Those that were: rank -> whether they were pushed to (or gave up).
        wrote: Rank -> the digest of the question that was pushed to.
        known: The host has had it.
        gone: Why its blocks are no longer there; empty while they are.
        jobs: The newest attempt of each decode rank.
        running: Attempts that have not ended.
    """

    puller: str = ""
    expected: tuple[int, ...] = ()
    served: dict[int, bool] = field(default_factory=dict)
    wrote: dict[int, bytes] = field(default_factory=dict)
    gone: str = ""
    known: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    running: int = 0

"""What a decode rank says to one prefill rank, and hears from it, in one attempt."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from typing import Any

import msgspec

from ascend_patch.impl import (
    kv_handshake,
    kv_limits,
    kv_vllm_link,
    kv_vllm_quarantine,
    kv_vllm_wire,
)
from ascend_patch.impl.kv_vllm_link import Link, LostError
from ascend_patch.impl.kv_vllm_wire import (
    ACCEPTED,
    CANCEL,
    DONE,
    FAILED,
    GO,
    PROCESS_PORT,
    READY,
    RESTARTED,
    Ask,
    log,
)

REPEAT_S = 2.0
# A peer that is asked this seldom has been silent for some ten seconds.
PROBE_AFTER_S = 5.0
# What an unpatched prefill server says before it writes. Of its other errors it is not known
# whether some of a request's ranges are still on their way.
BEFORE_WRITING = (
    "P num blocks less than D",
    "Timeout waiting for P side ready",
    "This P tp_rank ",
    "Mooncake: Heterogeneous TP is not supported",
)


class PullError(Exception):
    """A pull, or an attempt of it, that failed; `again` if another attempt may not."""

    def __init__(self, sentence: str, *, again: bool = False) -> None:
        super().__init__(sentence)
        self.again = again


class Conversation:
    """One attempt with one prefill rank.

    Attributes:
        told: What identifies the process and the job that accepted this attempt; None if the peer
            has no ascend_patch, or is not heard yet.
        doubtful: It may be writing.
    """

    def __init__(self, pull: Any, link: Link, rank: int, ask: Ask) -> None:
        self.pull, self.link, self.rank, self.ask = pull, link, rank, ask
        self.told: dict[str, Any] | None = None
        # An unpatched peer does not ask before it writes.
        self.doubtful = bool(ask.remote_hostname and pull.blocks)
        self.pushed = asyncio.Event()
        self.process: kv_vllm_quarantine.Process | None = None

    @property
    def name(self) -> str:
        """The peer, for messages."""
        return f"prefill rank {self.rank} at {self.link.address}"

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
                if self.told is not None or not self.ask.remote_hostname or self._is_patched():
                    log.debug("%s: no word from %s; saying it again", self.pull.name, self.name)
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
        state = str(ours.get("state"))
        if self.told is None:
            try:
                self.told = _identity(ours)
            except kv_limits.LimitError as error:
                # Kept, it would be said back for ever to a process that does not know it.
                log.debug("%s: an answer of %s is ignored: %s", self.pull.name, self.name, error)
                return ""
            # It asks before it writes.
            self.doubtful = False
            self.process = self.pull.receiver.process(self._place, self.link.address, self.told)
            self._meet(ours, answer)
        elif ours.get("nonce") != self.told.get("nonce"):
            # Whoever says so, the process that may write has not.
            raise PullError("the prefill server was restarted meanwhile", again=True)
        if state == FAILED:
            sentence = _sentence(answer.err_msg)
            if sentence != RESTARTED:
                self.doubtful = False
            raise PullError(sentence, again=ours.get("again") is True)
        return state

    def _meet(self, ours: dict[str, Any], answer: kv_vllm_wire.Answer) -> None:
        try:
            self.pull.meet(self.rank, ours)
        except PullError as error:
            if ours.get("state") != FAILED:
                raise
            raise PullError(f"{error} ({_sentence(answer.err_msg)})") from error

    def _hear_unpatched(self, answer: kv_vllm_wire.Answer) -> str:
        if self.told is not None:
            return ""  # A patched peer does not speak so.
        if not self.ask.remote_hostname:
            raise PullError(kv_handshake.both_sides(self.pull.ratio, "prefill"))
        if answer.status == kv_vllm_wire.ERROR or answer.err_reqs:
            sentence = _sentence(answer.err_msg)
            self.doubtful = self.doubtful and not sentence.startswith(BEFORE_WRITING)
            raise PullError(sentence)
        if self.pull.request in (answer.ok_reqs or ()):
            return DONE
        if answer.status == kv_vllm_wire.FINISH:
            # It names what it has written, and writes no more.
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
            }
            | {name: one for name, one in (self.told or {}).items() if name != PROCESS_PORT},
        )

    @property
    def _place(self) -> str:
        return f"{self.pull.meta.remote_engine_id} {self.link.address}"

    def _is_patched(self) -> bool:
        """Whether the rank that was asked is known, from other requests, to have ascend_patch."""
        return self._place in self.pull.receiver.processes

    async def has_ended(self) -> bool:
        """Whether the peer, whose connection is lost, is known to write no more."""
        if self.process is None:
            # A patched one that was not heard was not allowed to write.
            return self._is_patched()
        return await self.process.has_ended()

    async def give_up(self, *, last: bool) -> None:
        """Tell the peer, wait until it is known to write no more, and hang up.

        Args:
            last: Nobody asks again: it may free its blocks.
        """
        try:
            told = await self._cancel(last=last)
            await self._wait_for_end()
            if not told:
                await self._cancel(last=last)
        except LostError as error:
            if self.doubtful:
                log.warning("%s: %s while it may be writing", self.pull.name, error)
                self.link.close()
                ask = self._ask_again if self.told is not None else None
                await kv_vllm_quarantine.until_ended(self.has_ended, ask)
                self.doubtful = False
        finally:
            self.link.close()

    async def _wait_for_end(self, seconds: float = math.inf) -> None:
        """Wait until the peer says that it writes no more, or for so long."""
        deadline, pause = time.monotonic() + seconds, self.pull.receiver.repeat
        while self.doubtful and (left := deadline - time.monotonic()) > 0:
            answer = await self.link.answer(min(pause, left))
            if answer is not None:
                self.doubtful = self._still_writes(answer)
                continue
            if self.told is not None:
                # Its last word may be lost; asked about what it was allowed, it says it again.
                await self.link.send(self._message(GO))
            else:
                # The first word may be lost. An unpatched peer refuses this one, whatever it does
                # meanwhile; a patched one answers, and does not write before it is allowed to.
                await self.link.send(self._harmless())
            pause = min(1.5 * pause, kv_vllm_quarantine.LONGEST_PAUSE_S)
            # A connection may seem to live that has no other end any more.
            if pause > PROBE_AFTER_S and await kv_vllm_link.is_refused(self.link.address):
                raise LostError(f"{self.link.address} refuses connections")

    def _harmless(self) -> Ask:
        again = copy.copy(self.ask)
        again.remote_hostname = msgspec.UNSET
        return again

    async def _ask_again(self) -> bool:
        """Ask over a new connection whether it still writes: the old one may have been cut."""
        self.link.close()
        try:
            self.link = Link(self.pull.receiver.worker.async_zmq_ctx, self.link.address)
            await self.link.send(self._message(GO))
            await self._wait_for_end(2 * self.pull.receiver.repeat)
            if not self.doubtful:
                await self._cancel(last=True)
        except LostError:
            return False
        return not self.doubtful

    async def _cancel(self, *, last: bool) -> bool:
        # An unpatched peer would answer with an error, as if it had been about its push.
        if self.told is None and self.ask.remote_hostname:
            return False
        message = self._message(CANCEL)
        message.ascend_patch |= {"last": last}  # type: ignore[operator]
        await self.link.send(message)
        return True

    def _still_writes(self, answer: kv_vllm_wire.Answer) -> bool:
        try:
            return self._hear(answer) != DONE and self.doubtful
        except PullError:
            return self.doubtful


def _identity(ours: dict[str, Any]) -> dict[str, Any]:
    """What an answer says of its process and job; ascend-patch 0.1.0 has no job and no port.

    Raises:
        LimitError: It is not what it must be.
    """
    found: dict[str, Any] = {"nonce": kv_limits.text("nonce", ours.get("nonce"), 64)}
    if "job" in ours:
        found["job"] = kv_limits.whole("job", ours["job"], 0, 2**63 - 1)
    if PROCESS_PORT in ours:
        found[PROCESS_PORT] = kv_limits.port(PROCESS_PORT, ours[PROCESS_PORT])
    return found


def _sentence(found: str | None) -> str:
    """What a peer says went wrong, fit for a log."""
    try:
        return kv_limits.text("what the prefill server says", found, kv_limits.MAX_TEXT)
    except kv_limits.LimitError:
        return "the prefill server reports an error"

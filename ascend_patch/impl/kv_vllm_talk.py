"""What a decode rank says to one prefill rank, and hears from it, in one attempt."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ascend_patch.impl import kv_handshake, kv_vllm_wire
from ascend_patch.impl.kv_vllm_link import Link, LostError
from ascend_patch.impl.kv_vllm_wire import ACCEPTED, CANCEL, DONE, FAILED, GO, READY, Ask, log

REPEAT_S = 2.0
# After a peer is gone: what it had written to a socket may still be read from it.
SETTLE_S = 2.0


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
                if self.told is not None or not self.ask.remote_hostname:
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
            told = await self._cancel(last=last)
            while self.doubtful:
                answer = await self.link.answer(self.pull.receiver.repeat)
                if answer is not None:
                    self.doubtful = self._still_writes(answer)
                elif self.told is not None:
                    # Its last word may be lost; asked about what it was allowed, it says it again.
                    await self.link.send(self._message(GO))
            if not told:
                await self._cancel(last=last)
        except LostError:
            if self.doubtful:
                await asyncio.sleep(SETTLE_S)
        finally:
            self.link.close()

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

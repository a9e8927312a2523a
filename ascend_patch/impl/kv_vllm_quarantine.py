"""Blocks of a decode rank that somebody may still write to, and when they are known to be safe.

A request ends in a bounded time; a block goes back when its writer has ended, however long that
takes. That a writer has ended is known from:

- `done` or `failed` of the same attempt, from the process that accepted it (its nonce);
- its host, where that refuses connections twice, `SETTLE_S` apart, to a port that was reached
  before and is open as long as the process is there (`kv_vllm_process`): the process is gone, and
  what it had written to a socket has been read.

Nothing else is evidence: no silence, no lost connection, no answer that cannot be read, no other
nonce, and no side channel that refuses, which a shutdown closes while pushes go on. Until then the
writer is asked again, in longer and longer intervals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ascend_patch.impl import kv_limits, kv_vllm_link
from ascend_patch.impl.kv_vllm_wire import log

# After a peer is gone: what it had written to a socket may still be read from it.
SETTLE_S = 2.0
# Between two questions to a writer that does not answer.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# Many requests enter together; the status is written once for them.
WRITE_S = 0.2
FACT = "kv_quarantine"


@dataclass(frozen=True)
class Held:
    """A request whose blocks are kept."""

    blocks: int
    since: float


class Quarantine:
    """The blocks of a decode rank that are kept although their requests have ended.

    Args:
        num_blocks: Of the rank.
        share: Of its blocks; once so many are kept, no new pull begins.
    """

    def __init__(self, num_blocks: int, share: float) -> None:
        self.num_blocks, self.share = num_blocks, share
        self._held: dict[object, Held] = {}
        self._writing: Any = None

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return sum(one.blocks for one in self._held.values())

    @property
    def limit(self) -> int:
        """How many may be kept before new pulls are refused."""
        return max(1, int(self.share * self.num_blocks))

    def refusal(self) -> str:
        """Why no new pull may begin; empty if one may."""
        blocks = self.blocks
        if blocks < self.limit:
            return ""
        return (
            f"{blocks} of {self.num_blocks} blocks are kept for prefill servers that may still be "
            f"writing to them, and no pull begins above {self.limit}; restart the prefill servers "
            "that do not answer, or this server, or raise quarantine_share"
        )

    def enter(self, request: object, blocks: int) -> None:
        """Keep a request's blocks."""
        self._held[request] = Held(blocks, time.time())
        self._changed()

    def leave(self, request: object) -> None:
        """They may go back."""
        held = self._held.pop(request, None)
        if held is not None:
            self._changed()
            log.warning(
                "kv quarantine: %d blocks go back after %.0f s; %d of %d blocks are kept",
                held.blocks,
                time.time() - held.since,
                self.blocks,
                self.num_blocks,
            )

    def snapshot(self) -> dict[str, Any]:
        """For the status: blocks and requests that are kept, and since when (seconds of Unix)."""
        since = min((one.since for one in self._held.values()), default=None)
        return {
            "blocks": self.blocks,
            "requests": len(self._held),
            "since": since,
            "limit": self.limit,
        }

    def _changed(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        from ascend_patch import _runtime

        await asyncio.sleep(WRITE_S)
        state = _runtime.current().state
        state.facts[FACT] = self.snapshot()
        await asyncio.get_running_loop().run_in_executor(None, state.write)


class Process:
    """A prefill process; made when it is first heard.

    Args:
        side_channel: Where it listens, as tcp://host:port.
        nonce: Which the process drew.
        port: Which is open for as long as it is there; None if it has none (ascend-patch 0.1.0).
    """

    def __init__(self, side_channel: str, nonce: object, port: int | None) -> None:
        self.nonce, self.port = nonce, port
        host, _ = kv_limits.endpoint("the address of a prefill rank", side_channel)
        self._address = "" if port is None else f"tcp://{kv_limits.session(host, port)}"
        self._reached = False
        # It may be gone by the time that somebody asks.
        self._reaching = asyncio.ensure_future(self._reach())

    async def _reach(self) -> None:
        if self._address and not self._reached:
            self._reached = await kv_vllm_link.is_reached(self._address)

    async def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        if not self._reached:
            await self._reach()
        # What was never reached may be refused by a firewall.
        return self._reached and await has_ended(self._address)


async def has_ended(address: str) -> bool:
    """Whether its host refuses connections to an address, now and `SETTLE_S` later."""
    if not await kv_vllm_link.is_refused(address):
        return False
    await asyncio.sleep(SETTLE_S)
    return await kv_vllm_link.is_refused(address)


async def until_ended(
    ended: Callable[[], Awaitable[bool]], ask: Callable[[], Awaitable[bool]] | None = None
) -> None:
    """Wait until a writer has ended; its connection is lost.

    Args:
        ended: Looks whether it is known to.
        ask: Asks it over a new connection, and returns whether it says so; None: it cannot be.
    """
    pause = FIRST_PAUSE_S
    while not await ended():
        if ask is not None and await ask():
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)

"""What an attempt of a prefill rank waits for: its request's blocks, and leave to write."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from ascend_patch.impl.kv_vllm_requests import Job, PushError, Record

POLL_S, EXPIRE_S = 1.0, 0.001
EXPIRED = "its blocks were freed, because nobody fetched them"


class EventWaiter:
    """Waits for events of attempts, each for a bounded time.

    Args:
        worker: The host's MooncakeConnectorWorker, which knows the requests that still have blocks.
        timeout: Seconds.
    """

    def __init__(self, worker: Any, timeout: float) -> None:
        self.worker, self.timeout = worker, timeout
        self._expiring = asyncio.Lock()

    async def wait(self, event: asyncio.Event, job: Job, record: Record) -> None:
        """Return when the event is set.

        Raises:
            PushError: The request's blocks are gone, the decode rank gave the attempt up, or
                nothing happened in time.
        """
        deadline = time.monotonic() + self.timeout
        while not event.is_set():
            if record.gone or job.transfer not in self.worker.reqs_need_send:
                raise PushError(record.gone or EXPIRED)
            if time.monotonic() > deadline:
                # Thousands may reach it together: one at a time, and others between them.
                async with self._expiring:
                    await asyncio.sleep(EXPIRE_S)
                if not event.is_set():
                    raise PushError(f"nothing happened for {self.timeout:.0f} s")
                continue
            try:
                # Those that began together do not look together.
                await asyncio.wait_for(event.wait(), POLL_S * random.uniform(0.75, 1.25))
            except asyncio.TimeoutError:
                continue
        if job.given_up:
            raise PushError("the decode rank gave this attempt up")

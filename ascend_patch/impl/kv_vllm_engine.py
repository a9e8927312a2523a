"""Mooncake's engine over TCP, on a machine whose cores are busy: no spinning, and no early end.

`batch_transfer_sync_write` asks for a batch's state without a pause, on a core that the engine's
one thread, or the peer's, may need. It returns an error as soon as one range has failed, or after
30 s: the others are still queued, so they are read and written when both sides have given their
blocks away. Here each range is handed over, and asked for, by itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascend_patch.impl.kv_vllm_wire import log

# Ranges that are on their way to one peer. Mooncake 0.3.13 queues 1024, and lets as many more wait
# for a second; what does not fit fails.
WINDOW = 256
# Between two questions: the first, and the longest, in seconds.
PAUSE_S, LONGEST_PAUSE_S = 0.0002, 0.005
SLOW_S = 30.0
# What transfer_submit_write returns for a range that it does not take: -1 in older releases.
REFUSED = (0, -1, 2**64 - 1)
WAITING, WRITTEN, FAILED = 0, 1, -1
THREADS = Path("/proc/self/task")


class Writer:
    """Writes to peers; a peer has one push at a time, because all share its queue."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._locks: dict[str, threading.Lock] = {}

    def write(
        self, session: str, local: Sequence[int], remote: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """0 if all is written, else -1; in either case nothing is on its way any more.

        Args:
            session: The peer's engine, host:port.
            local: Addresses to read from.
            remote: Addresses to write to.
            lengths: In bytes.
        """
        with self._locks.setdefault(session, threading.Lock()):
            return self._write(session, zip(local, remote, lengths, strict=True))

    def _write(self, session: str, ranges: Iterator[tuple[int, int, int]]) -> int:
        engine, pending = self._engine, deque[int]()
        code, pause, moved = 0, PAUSE_S, time.monotonic()
        while True:
            while code == 0 and len(pending) < WINDOW and (one := next(ranges, None)):
                batch = engine.transfer_submit_write(session, *one)
                if batch in REFUSED:
                    code = -1
                else:
                    pending.append(batch)
            if not pending:
                return code
            state = engine.transfer_check_status(pending[0])
            if state in (WRITTEN, FAILED):
                pending.popleft()
                code = code if state == WRITTEN else -1
                pause, moved = PAUSE_S, time.monotonic()
                continue
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            if time.monotonic() - moved > SLOW_S:
                moved = time.monotonic()
                log.warning(
                    "kv push to %s: Mooncake has written nothing for %.0f s, and %d ranges are on "
                    "their way; the blocks are kept until it has, or has failed",
                    session,
                    SLOW_S,
                    len(pending),
                )


def fits(engine: Any, protocol: str) -> bool:
    """Whether ranges are written by a `Writer`: TCP alone needs it, and each costs two calls."""
    return protocol == "tcp" and hasattr(engine, "transfer_submit_write")


@contextmanager
def all_cores() -> Iterator[None]:
    """Let threads that are started in this block run on every core that the process may use.

    vLLM's CPU worker binds its thread to the cores of its share, and threads inherit that: the
    engine's would wait there for a loop that polls, while another core is idle.
    """
    if not THREADS.is_dir():
        yield
        return
    mine = os.sched_getaffinity(0)
    cores = set(mine)
    for thread in THREADS.iterdir():
        try:
            cores |= os.sched_getaffinity(int(thread.name))
        except ProcessLookupError:
            continue  # it has ended meanwhile
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)

"""How a prefill rank's bytes come to a decode rank, once it may write: in a sender's thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ascend_patch.kernels.kv_layout import (
    Pairs,
    Plan,
    copy_staged,
    descriptors,
    match_blocks,
    staged_rounds,
)

STAGING_BYTES = 16 << 20


class StagingError(RuntimeError):
    """The engine does not take the buffer; the message is a sentence."""


@dataclass(frozen=True)
class Push:
    """One request's way to one decode rank.

    Attributes:
        session: The decode rank's engine, host:port.
        bases: Addresses of its regions.
    """

    plan: Plan
    prefill_rank: int
    decode_rank: int
    pairs: Pairs
    session: str
    bases: Sequence[int]


def pairs_of(
    plan: Plan,
    prefill_blocks: Sequence[int],
    decode_blocks: Sequence[int],
    *,
    tokens: int | None,
    cached_blocks: int | None,
) -> Pairs:
    """Which block goes to which.

    Raises:
        ValueError: They do not belong together; see `match_blocks`.
    """
    return match_blocks(
        plan.topology, prefill_blocks, decode_blocks, tokens=tokens, cached_blocks=cached_blocks
    )


class Pusher:
    """Writes what a plan says; `worker` is the host's, `views` its regions as tensors.

    Where a decode rank takes some of a rank's heads token by token (NHD, decode TP larger), they
    are packed in a buffer first: a range for each token takes TCP seconds, and the engine's queue.
    """

    def __init__(self, worker: Any, views: Sequence[Any]) -> None:
        self.worker, self.views = worker, views
        self._lock = threading.Lock()
        self._staging: Any = None

    def push(self, one: Push, decode_num_blocks: int | None) -> tuple[int, int]:
        """Write, and return (the engine's code, bytes written).

        Raises:
            ValueError: The blocks or addresses do not fit the plan; nothing was written.
            StagingError: The engine cannot register the buffer.
        """
        worker = self.worker
        ranks = one.plan, one.prefill_rank, one.decode_rank, one.pairs
        direct = descriptors(
            *ranks,
            prefill_bases=worker.kv_caches_base_addr,
            decode_bases=one.bases,
            prefill_num_blocks=worker.num_blocks,
            decode_num_blocks=decode_num_blocks,
            staged=True,
        )
        code = worker._send_blocks(one.session, *direct.lists()) if len(direct) else 0
        written = direct.total_bytes
        transfer = one.plan.transfer(one.prefill_rank, one.decode_rank)
        runs = [run for piece in (transfer.pieces if transfer else ()) for run in piece.runs]
        if code or not any(run.is_staged(one.plan.direction) for run in runs):
            return code, written
        with self._lock:
            staging = self._buffer()
            rounds = staged_rounds(
                *ranks,
                prefill_bases=worker.kv_caches_base_addr,
                decode_bases=one.bases,
                staging_base=staging.data_ptr(),
                staging_bytes=staging.nbytes,
            )
            for found in rounds:
                copy_staged(found, self.views, staging)
                self._wait(staging)
                code = worker._send_blocks(one.session, *found.ranges.lists())
                if code:
                    break
                written += found.ranges.total_bytes
        return code, written

    def _buffer(self) -> Any:
        import torch

        if self._staging is None:
            device = self.views[0].device
            if device.type != "cpu":
                # This thread has a device of its own.
                torch.accelerator.set_device_index(device.index)
            staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=device)
            if self.worker.engine.batch_register_memory([staging.data_ptr()], [staging.nbytes]):
                raise StagingError(
                    f"Mooncake's transfer engine cannot register a buffer of {STAGING_BYTES} bytes"
                )
            self._staging = staging
        return self._staging

    def _wait(self, staging: Any) -> None:
        import torch

        if staging.device.type != "cpu":
            torch.accelerator.synchronize(staging.device.index)

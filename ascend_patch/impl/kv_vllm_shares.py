"""Which part of a block a prefill rank sends, in vLLM 0.19 to 0.29, where its heads are replicas.

There all prefill ranks that a decode rank hears of send, or the first of them alone. Right is: the
first replica of each head, to that head's place. With prefill TP 4, 2 KV heads and decode TP 1 the
release sends head 0 and never head 1, says that all went well, and skips the check of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Share = tuple[bool, int, int, int]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def sender_transfer_plan(
    wrapped: Callable[..., Share], instance: Any, args: Args, kwargs: Kwargs
) -> Share:
    """_compute_sender_transfer_plan: (sends, source offset, target offset, bytes) in a block."""
    ours = _share(*args, **kwargs)
    return wrapped(*args, **kwargs) if ours is None else ours


def _share(
    local_tp_rank: int,
    local_tp_size: int,
    remote_tp_rank: int,
    remote_tp_size: int,
    local_kv_block_len: int,
    remote_kv_block_len: int,
    producer_cache_replicated: bool,
) -> Share | None:
    """None where the release is right."""
    ratio = local_tp_size // remote_tp_size
    if not producer_cache_replicated or local_kv_block_len == remote_kv_block_len or ratio < 1:
        return None
    # Heads of a decode block in prefill's, and ranks that hold the same of them.
    shares = remote_kv_block_len // local_kv_block_len
    replicas = ratio // shares
    number, replica = divmod(local_tp_rank % ratio, replicas)
    return replica == 0, 0, number * local_kv_block_len, local_kv_block_len


def region_lengths(
    wrapped: Callable[..., str | None], instance: Any, args: Args, kwargs: Kwargs
) -> str | None:
    """_validate_asymmetric_region_lengths: also where prefill's heads are replicas."""
    return wrapped(*args, **kwargs) or _refusal(*args, **kwargs)


def _refusal(
    local_regions: Any,
    remote_regions: Any,
    local_tp_size: int,
    remote_tp_size: int,
    producer_cache_replicated: bool,
) -> str | None:
    if not producer_cache_replicated:
        return None
    for number, (local, remote) in enumerate(zip(local_regions, remote_regions, strict=True)):
        here, there = local.kv_block_len, remote.kv_block_len
        if here == there:
            continue
        ratio = local_tp_size // remote_tp_size
        shares = there // here
        if there % here or ratio < 1 or ratio % shares:
            return (
                f"prefill TP {local_tp_size} -> decode TP {remote_tp_size}: a block of KV region "
                f"{number} has {here} bytes on a prefill rank, whose heads are replicas, and "
                f"{there} on a decode rank; start both servers with the same model, --dtype, "
                "--kv-cache-dtype and --block-size"
            )
    return None

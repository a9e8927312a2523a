"""Which cache slots a batch's states are in, from vllm-ascend's block tables on the host.

A block table's rows are written on the host and copied to the device once a step; the device's
copy is what a metadata builder is given. What is in it the host therefore knows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

# Every block table that the runner has built; they go when it goes.
_tables: weakref.WeakSet[Any] = weakref.WeakSet()


def remember(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`BlockTable.__init__`: this one has a copy on the host."""
    wrapped(*args, **kwargs)
    _tables.add(instance)


def on_host(block_table: Tensor) -> Tensor | None:
    """The host's rows of a batch's block table; None for one that no runner's table begins with.

    Args:
        block_table: int32 [B, blocks] on the device, the first rows of a runner's table.

    Returns:
        int32 [B, blocks] on the CPU. Rows that pad the batch hold what earlier requests left.
    """
    if not block_table.numel():
        return None
    for table in tuple(_tables):
        buffer = table.block_table
        if (
            buffer.gpu.data_ptr() == block_table.data_ptr()
            and buffer.gpu.stride() == block_table.stride()
            and len(block_table) <= len(buffer.cpu)
        ):
            rows: Tensor = buffer.cpu[: len(block_table)]
            return rows
    return None


def slots(builder: Any, common: Any, lengths: Tensor, seq_lens: Tensor) -> Tensor | None:
    """The first state's slot of each request, as `mamba_get_block_table_tensor(...)[:, 0]` has it.

    Args:
        builder: The GDNAttentionMetadataBuilder: its cache mode and block size are read.
        common: CommonAttentionMetadata of B requests.
        lengths: int [B] on the CPU, tokens of this step.
        seq_lens: int [B] on the CPU, those and all before.

    Returns:
        int64 [B] on the CPU; None where the host has no copy of the table.
    """
    rows = on_host(common.block_table_tensor)
    if rows is None or len(rows) != len(lengths):
        return None
    column = torch.zeros(len(rows), dtype=torch.int64)
    if builder.vllm_config.cache_config.mamba_cache_mode == "align":
        column = ((seq_lens - 1) // builder.kv_cache_spec.block_size).clamp_min(0).long()
    found = rows.gather(1, column[:, None])[:, 0].long()
    # The runner clears the device's rows behind the last request, and not the host's.
    requests = int((lengths > 0).nonzero().max()) + 1 if bool((lengths > 0).any()) else 0
    found[requests:] = 0
    return found

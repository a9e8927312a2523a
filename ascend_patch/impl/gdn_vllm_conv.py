"""What the causal convolution of vLLM 0.11 to 0.19 asks of a batch with prefill."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Tokens that a program of the release's convolution takes.
BLOCK = 8
_LEAST = 1024
_NONE = -1


def blocks_of(starts: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Which programs there are.

    Args:
        starts: int [N + 1], where each sequence begins.

    Returns:
        int64 [N], how many programs each sequence has, and int32 [2, at least 2048] for the
        device: of each program its sequence, and its block in it; -1 behind them.
    """
    counts = -(-np.diff(starts) // BLOCK)
    sequence = np.repeat(np.arange(len(counts)), counts)
    block = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = np.full((2, 2 * max(_LEAST, len(sequence))), _NONE, dtype=np.int32)
    padded[0, : len(sequence)], padded[1, : len(sequence)] = sequence, block
    return counts, padded


def fields(counts: npt.NDArray[Any], padded: npt.NDArray[Any], sent: Tensor) -> dict[str, Any]:
    """The fields of GDNAttentionMetadata that carry them.

    Args:
        counts: What `blocks_of` returned.
        padded: Likewise.
        sent: ``padded`` on the device.
    """
    total = int(counts.sum())
    by_sequence, by_block = sent
    programs = {"batch_ptr": by_sequence, "token_chunk_offset_ptr": by_block}
    table = {
        "nums": torch.from_numpy(counts),
        "tot": total,
        "mlist": torch.from_numpy(padded[0, :total].astype(np.int64)),
        "mlist_len": total,
        "offsetlist": torch.from_numpy(padded[1, :total].copy()),
        **programs,
    }
    return {**programs, "nums_dict": {BLOCK: table}}

"""Chunk tables of a batch of variable-length sequences, built on the host, copied once.

A chunked kernel's programs need to know which sequence and which chunk of it they serve. Deriving
that from cu_seqlens on the device makes the host wait for its length, in every layer; the scheduler
knows the lengths before anything is enqueued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ascend_patch.kernels.gdn.staging import PinnedStaging

# vllm-ascend's solve_tril works through two blocks of 608 tokens at a time.
LARGE_BLOCK = 1216
# Elements of the decays that vllm-ascend's cumulative sum holds at a time, at chunks of 64.
_CUMSUM_ELEMENTS = 1 << 18
_CUMSUM_CHUNK = 64
# Parts of the one copy begin at addresses that are multiples of this, as fresh tensors do: Triton
# compiles another kernel for a pointer that is aligned less.
_ALIGNED = 16


def cumsum_block(num_heads: int) -> int:
    """Tokens that vllm-ascend's chunk_local_cumsum takes at a time, for a rank's value heads.

    Raises:
        ValueError: There are no heads.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, not {num_heads}")
    block = max(1, _CUMSUM_ELEMENTS // (num_heads * _CUMSUM_CHUNK))
    return 1 << (block - 1).bit_length()


@dataclass(frozen=True)
class ChunkTable:
    """Where chunks of one size lie; int32, on the kernels' device. C chunks of N sequences.

    Attributes:
        indices: [C, 2], the sequence and the chunk within it; a sequence without tokens has none,
            and keeps its number.
        offsets: [N + 1], the first chunk of each sequence; the last entry is C.
        update_offsets: [N + 1], the same with one more chunk a sequence, for its final state.
        final_indices: [N], where those lie.
    """

    indices: Tensor
    offsets: Tensor
    update_offsets: Tensor
    final_indices: Tensor


@dataclass(frozen=True)
class ChunkMetadata:
    """What `build_chunk_metadata` found.

    Attributes:
        starts: query_start_loc on the host.
        cu_seqlens: int32 [N + 1], the same on the device.
        tables: chunk size -> its table.
    """

    starts: tuple[int, ...]
    cu_seqlens: Tensor
    tables: Mapping[int, ChunkTable]

    def table(self, chunk_size: int) -> ChunkTable:
        """The table of one chunk size.

        Raises:
            KeyError: It was not built; tables of other sizes would answer wrongly.
        """
        if chunk_size not in self.tables:
            raise KeyError(
                f"no chunk table for size {chunk_size}; built were those of "
                f"{', '.join(map(str, self.tables))}: add it to chunk_sizes"
            )
        return self.tables[chunk_size]


def build_chunk_metadata(
    query_start_loc_cpu: Tensor,
    device: torch.device,
    *,
    chunk_sizes: Sequence[int] = (64,),
    staging: PinnedStaging | None = None,
) -> ChunkMetadata:
    """Build the chunk tables of a batch and enqueue one copy of all of them.

    Args:
        query_start_loc_cpu: int32 or int64 [N + 1] on the CPU, from 0 and never falling.
        device: Where the kernels run.
        chunk_sizes: In tokens; each has a table of its own.
        staging: Host memory for asynchronous copies; without it the host waits for the copy.

    Raises:
        TypeError: query_start_loc_cpu is no integer tensor.
        ValueError: It is not on the CPU, has another shape, or falls; a size is below 1.
    """
    starts = _checked(query_start_loc_cpu)
    sizes = tuple(dict.fromkeys(chunk_sizes))
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"chunk_sizes must be whole numbers of tokens, not {chunk_sizes!r}")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"chunk_sizes must be one or more positive sizes, not {chunk_sizes!r}")
    lengths = np.diff(starts)
    counts = [-(-lengths // size) for size in sizes]
    places, elements = _places(len(lengths), [int(count.sum()) for count in counts])

    def fill(memory: npt.NDArray[np.int32]) -> None:
        memory[places[0][0]] = starts
        for count, parts in zip(counts, places[1:], strict=True):
            _write(memory, parts, count)

    if staging is not None and device.type != "cpu":
        packed = staging.send(elements, fill)
    else:
        host = torch.empty(elements, dtype=torch.int32)
        fill(host.numpy())
        packed = host.to(device)
    cu_seqlens = packed[places[0][0]]
    tables = {
        size: ChunkTable(packed[parts[0]].view(-1, 2), *(packed[part] for part in parts[1:]))
        for size, parts in zip(sizes, places[1:], strict=True)
    }
    return ChunkMetadata(tuple(starts.tolist()), cu_seqlens, tables)


def check_metadata(metadata: object, device: torch.device) -> None:
    """Raise TypeError or ValueError for what is no batch's metadata, or lies on another device."""
    if not isinstance(metadata, ChunkMetadata):
        raise TypeError(
            "chunk_metadata must be what build_chunk_metadata returns, not a "
            f"{type(metadata).__name__}"
        )
    if metadata.cu_seqlens.device != device:
        raise ValueError(
            f"chunk_metadata is for {metadata.cu_seqlens.device}, and the tensors are on {device}: "
            "build it for that device"
        )


def _checked(query_start_loc: Tensor) -> npt.NDArray[np.int64]:
    if not isinstance(query_start_loc, Tensor):
        raise TypeError(f"query_start_loc must be a tensor, not a {type(query_start_loc).__name__}")
    if query_start_loc.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"query_start_loc must be int32 or int64, not {query_start_loc.dtype}")
    if query_start_loc.device.type != "cpu":
        raise ValueError(
            f"query_start_loc is on {query_start_loc.device}; pass the scheduler's copy on the "
            "CPU: reading the device's would wait for it"
        )
    if query_start_loc.dim() != 1 or query_start_loc.numel() < 1:
        raise ValueError(f"query_start_loc must be [N + 1], not {tuple(query_start_loc.shape)}")
    starts: npt.NDArray[np.int64] = query_start_loc.numpy().astype(np.int64)
    if starts[0] != 0 or (np.diff(starts) < 0).any():
        raise ValueError("query_start_loc must begin with 0 and never fall: it sums up lengths")
    if starts[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"query_start_loc ends at token {starts[-1]}; kernels count in int32, up to "
            f"{np.iinfo(np.int32).max}"
        )
    return starts


def _places(sequences: int, chunks: Sequence[int]) -> tuple[list[tuple[slice, ...]], int]:
    """Where each part lies in the one copy, and how many elements that has."""
    at = 0

    def place(elements: int) -> slice:
        nonlocal at
        here = slice(at, at + elements)
        at += -(-elements // _ALIGNED) * _ALIGNED
        return here

    found: list[tuple[slice, ...]] = [(place(sequences + 1),)]
    for count in chunks:
        sizes = (2 * count, sequences + 1, sequences + 1, sequences)
        found.append(tuple(place(size) for size in sizes))
    return found, at


def _write(
    memory: npt.NDArray[np.int32], parts: tuple[slice, ...], count: npt.NDArray[Any]
) -> None:
    """One table, by the number of chunks of each sequence."""
    indices, offsets, update_offsets, final_indices = (memory[part] for part in parts)
    offsets[0] = update_offsets[0] = 0
    np.cumsum(count, out=offsets[1:])
    np.cumsum(count + 1, out=update_offsets[1:])
    final_indices[:] = update_offsets[1:] - 1
    pairs = indices.reshape(-1, 2)
    pairs[:, 0] = np.repeat(np.arange(len(count)), count)
    pairs[:, 1] = np.arange(len(pairs)) - np.repeat(offsets[:-1], count)

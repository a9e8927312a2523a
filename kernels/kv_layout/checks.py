"""Numbers that become addresses: block ids, ranks, strides and bases, held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ascend_patch.kernels.kv_layout.topology import Topology

if TYPE_CHECKING:
    from ascend_patch.kernels.kv_layout.descriptors import Pairs
    from ascend_patch.kernels.kv_layout.staged import Copy

Ints = npt.NDArray[np.int64]
# Addresses are int64: a range must end below this.
LIMIT = 2**63


def whole_numbers(name: str, given: object) -> Ints:
    """Numbers that a caller gave, as int64 [N].

    Args:
        name: What they are, for the message.
        given: A sequence, an array or a CPU tensor of integers.

    Raises:
        TypeError: One is no integer: 1.5, True and None are not.
        ValueError: There is more than one dimension, or one is below 0 or at least 2**63.
    """
    if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
        raise TypeError(f"{name} must be a list of whole numbers, not {given!r}.")
    if isinstance(given, list | tuple) and {bool, np.bool_} & set(map(type, given)):
        raise TypeError(f"{name} must be whole numbers; True and False are none.")
    try:
        found = np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} must be a list of numbers, not of lists.") from None
    except OverflowError:
        raise ValueError(f"{name} must be below 2**63.") from None
    if found.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, not of {found.ndim} dimensions.")
    if found.dtype.kind not in "iu" and found.size:
        for number in given:  # type: ignore[attr-defined]
            if isinstance(number, bool) or not isinstance(number, Integral):
                raise TypeError(f"{name} must be whole numbers; {number!r} is none.")
        raise ValueError(f"{name} must be numbers that are at least 0 and below 2**63.")
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < LIMIT:
        raise ValueError(
            f"{name} must be numbers that are at least 0 and below 2**63; they run from "
            f"{int(found.min())} to {int(found.max())}."
        )
    return found.astype(np.int64)


def check_ranks(topology: Topology, prefill_rank: int, decode_rank: int) -> None:
    """Raise TypeError or ValueError for ranks that the two sides do not have."""
    for name, rank, side in (
        ("prefill", prefill_rank, topology.prefill),
        ("decode", decode_rank, topology.decode),
    ):
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"The {name} rank must be a whole number, not {rank!r}.")
        if not 0 <= rank < side.world:
            raise ValueError(f"There is no {name} rank {rank}; there are {side.world}.")


def check_pairs(topology: Topology, pairs: Pairs) -> None:
    """Raise TypeError or ValueError for pairs that `match_blocks` would not make."""
    sizes = topology.prefill.block_size, topology.decode.block_size
    columns = {
        name: whole_numbers(f"The {name.replace('_', ' ')}s of the pairs", getattr(pairs, name))
        for name in ("prefill_block", "prefill_unit", "decode_block", "decode_unit")
    }
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(
            "The pairs' columns must be equally long; they have "
            f"{', '.join(f'{len(column)} {name}s' for name, column in columns.items())}."
        )
    for name, size in zip(("prefill_unit", "decode_unit"), sizes, strict=True):
        most, column = size // min(sizes), columns[name]
        if len(column) and column.max() >= most:
            raise ValueError(f"{name} {column.max()} is not in a block: it has {most} units.")


def check_reach(name: str, bases: Ints, strides: Ints, blocks: Ints) -> None:
    """Raise ValueError where the last block ends beyond what an address can say."""
    last = int(blocks.max()) + 1 if len(blocks) else 0
    reach = max((int(b) + int(s) * last for b, s in zip(bases, strides, strict=True)), default=0)
    if reach >= LIMIT:
        raise ValueError(
            f"Block {last - 1} of the {name} rank ends at address {reach}, beyond 2**63: the "
            "address, the stride or the block id is wrong."
        )


def check_within(part: Copy, regions: Sequence[Tensor], staging: Tensor) -> None:
    """Raise ValueError where a copy reaches past a region's storage, or past the buffer."""
    if not 0 <= part.region < len(regions):
        raise ValueError(f"There is no region {part.region}; {len(regions)} were given.")
    cache = regions[part.region]
    here = cache.untyped_storage().nbytes() - cache.storage_offset() * cache.element_size()
    block, unit = (int(x.max()) if len(x) else 0 for x in (part.blocks, part.units))
    within = (block, unit, part.count - 1)
    reach = part.offset + sum(n * step for n, step in zip(within, part.steps, strict=True))
    items = (len(part.blocks) - 1, part.count - 1)
    buffered = part.staging_offset + sum(
        n * step for n, step in zip(items, part.staging_steps, strict=True)
    )
    for name, end, size in (
        (f"region {part.region}", reach + part.length, here),
        ("the staging buffer", buffered + part.length, staging.numel() * staging.element_size()),
    ):
        if end > size:
            raise ValueError(f"A copy ends at byte {end} of {name}, which has {size}.")

"""Heads taken token by token, through a buffer: a range for each block, not for each token.

Where decode has more ranks than prefill, and blocks are NHD, a decode rank needs a part of each
token's heads: as byte ranges these are block_size for each block, part and layer. With a staging
buffer on the side that acts, they are one. A pushing prefill rank packs the heads there and sends
them in one piece. A pulling decode rank fetches all of a prefill rank's heads (so many times the
bytes as prefill has heads more) and takes its own from there.

The buffer is as large as its owner likes: the work is done in rounds that fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ascend_patch.kernels import arguments
from ascend_patch.kernels.kv_layout.checks import (
    LIMIT,
    Ints,
    check_pairs,
    check_ranks,
    check_reach,
    check_within,
    whole_numbers,
)
from ascend_patch.kernels.kv_layout.descriptors import Descriptors, Pairs, joined, side_arrays
from ascend_patch.kernels.kv_layout.geometry import PULL, Run
from ascend_patch.kernels.kv_layout.plan import Plan, Transfer

# Bytes: a block begins at a multiple of it in the buffer.
ITEM_ALIGNMENT = 16


@dataclass(frozen=True)
class Copy:
    """Byte ranges between a region of the acting rank and its staging buffer.

    Item i of them is block ``blocks[i]``, unit ``units[i]``: ``count`` ranges of ``length`` bytes,
    ``steps`` apart in (block, unit, range) from ``offset`` on in the region, and ``staging_steps``
    apart in (item, range) from ``staging_offset`` on in the buffer.
    """

    region: int
    blocks: Ints
    units: Ints
    count: int
    length: int
    offset: int
    steps: tuple[int, int, int]
    staging_offset: int
    staging_steps: tuple[int, int]


@dataclass(frozen=True)
class Round:
    """What fits the buffer at a time: pull, then `copy_staged`; or that, then push."""

    ranges: Descriptors
    copies: tuple[Copy, ...]


def staged_rounds(
    plan: Plan,
    prefill_rank: int,
    decode_rank: int,
    pairs: Pairs,
    *,
    prefill_bases: Sequence[int],
    decode_bases: Sequence[int],
    staging_base: int,
    staging_bytes: int,
    prefill_strides: Sequence[int] | None = None,
    decode_strides: Sequence[int] | None = None,
) -> Iterator[Round]:
    """What `descriptors(staged=True)` leaves out between two ranks, round by round.

    Args:
        staging_base: Address of the acting rank's buffer, registered with the engine.
        staging_bytes: Its size.
        (others): As `descriptors` has them.

    Raises:
        ValueError: As `descriptors`; or the buffer does not hold one block of a part.
    """
    sides = _sides(
        plan,
        prefill_rank,
        decode_rank,
        pairs,
        (prefill_bases, prefill_strides),
        (decode_bases, decode_strides),
    )
    for name, given in (("staging_base", staging_base), ("staging_bytes", staging_bytes)):
        if not whole_numbers(name, [given])[0]:
            raise ValueError(f"{name} must be above 0: the buffer is memory of the acting rank.")
    if staging_base + staging_bytes >= LIMIT:
        raise ValueError(f"The staging buffer ends beyond 2**63: {staging_base} + {staging_bytes}.")
    acting, other = reversed(sides) if plan.direction == PULL else sides
    transfer = plan.transfer(prefill_rank, decode_rank)
    used, ranges, copies = 0, list[Ints](), list[Copy]()
    starts = list[Ints]()
    for layer, run in _runs(transfer, plan.direction):
        size, between = _item(run, plan.direction)
        room = _rounded(size)
        if room > staging_bytes:
            raise ValueError(f"The staging buffer has {staging_bytes} bytes; a block takes {room}.")
        here, there = acting.part(layer, run), other.part(layer, run)
        first, total = 0, len(here.blocks)
        while first < total:
            fits = (staging_bytes - used) // room
            if not fits:
                yield _round(plan, staging_base, ranges, starts, copies)
                used, ranges, starts, copies = 0, [], [], []
                continue
            part = slice(first, first + fits)
            items = used + room * np.arange(len(here.blocks[part]), dtype=np.int64)
            ranges.append(np.stack((items, np.full(len(items), size, np.int64))))
            starts.append(there.addresses[part])
            copies.append(
                Copy(
                    region=here.region,
                    blocks=here.blocks[part],
                    units=here.units[part],
                    count=run.count,
                    length=run.length,
                    offset=here.offset,
                    steps=here.steps,
                    staging_offset=used,
                    staging_steps=(room, between),
                )
            )
            used += room * len(items)
            first += len(items)
    if copies:
        yield _round(plan, staging_base, ranges, starts, copies)


def least_staging(plan: Plan) -> int:
    """Bytes that a buffer must have at least for any two ranks of a plan; 0: none is needed."""
    runs = (run for transfer in plan.transfers for _, run in _runs(transfer, plan.direction))
    return max((_rounded(_item(run, plan.direction)[0]) for run in runs), default=0)


def _runs(transfer: Transfer | None, direction: str) -> Iterator[tuple[tuple[int, int], Run]]:
    """The first regions of a layer on both ranks, and a run of it."""
    for piece in transfer.pieces if transfer is not None else ():
        for layer in piece.layers:
            for run in piece.runs:
                if run.is_staged(direction):
                    yield layer, run


def _item(run: Run, direction: str) -> tuple[int, int]:
    """(bytes of a block unit in the buffer, from one of its ranges to the next)."""
    if direction == PULL:
        return (run.count - 1) * run.prefill_step + run.length, run.prefill_step
    return run.count * run.length, run.length


def _rounded(size: int) -> int:
    return -(-size // ITEM_ALIGNMENT) * ITEM_ALIGNMENT


@dataclass(frozen=True)
class _Part:
    """Where a run is on one rank: a region, and the address in it of each pair's unit."""

    region: int
    blocks: Ints
    units: Ints
    offset: int
    steps: tuple[int, int, int]
    base: int

    @property
    def addresses(self) -> Ints:
        inside = self.steps[0] * self.blocks + self.steps[1] * self.units
        return np.asarray(self.base + self.offset + inside, np.int64)


@dataclass(frozen=True)
class _Side:
    """One rank: `prefill` or `decode`, its regions, and its blocks of each pair."""

    name: str
    bases: Ints
    strides: Ints
    blocks: Ints
    units: Ints

    def part(self, layer: tuple[int, int], run: Run) -> _Part:
        def of(field: str) -> int:
            return int(getattr(run, f"{self.name}_{field}"))

        region = layer[self.name == "decode"] + of("region")
        steps = (int(self.strides[region]), of("unit_step"), of("step"))
        base = int(self.bases[region])
        return _Part(region, self.blocks, self.units, of("offset"), steps, base)


_Given = tuple[Sequence[int], Sequence[int] | None]


def _sides(
    plan: Plan, prefill_rank: int, decode_rank: int, pairs: Pairs, prefill: _Given, decode: _Given
) -> tuple[_Side, _Side]:
    topology = plan.topology
    check_ranks(topology, prefill_rank, decode_rank)
    check_pairs(topology, pairs)
    origin = side_arrays("prefill", topology.prefill.regions(prefill_rank), *prefill)
    target = side_arrays("decode", topology.decode.regions(decode_rank), *decode)
    check_reach("prefill", *origin, pairs.prefill_block)
    check_reach("decode", *target, pairs.decode_block)
    return (
        _Side("prefill", *origin, pairs.prefill_block, pairs.prefill_unit),
        _Side("decode", *target, pairs.decode_block, pairs.decode_unit),
    )


def _round(
    plan: Plan, base: int, ranges: list[Ints], starts: list[Ints], copies: list[Copy]
) -> Round:
    items, lengths = np.concatenate(ranges, axis=1)
    there, here = np.concatenate(starts), items + base
    prefill, decode = (there, here) if plan.direction == PULL else (here, there)
    sizes = [len(one) for one in starts]
    found = Descriptors(*joined(prefill, decode, lengths, sizes), plan.direction)
    return Round(found, tuple(copies))


def copy_staged(one: Round, regions: Sequence[Tensor], staging: Tensor) -> None:
    """Copy between the acting rank's caches and its buffer; which way, the direction says.

    Args:
        regions: The rank's caches in the order of its regions; any shape and dtype, each beginning
            with block 0.
        staging: The buffer, contiguous, on the same device.

    Raises:
        TypeError: Something is no tensor.
        ValueError: Devices differ, a tensor requires a gradient, a region is missing, or a copy
            does not lie within a region or the buffer; nothing has been copied.
    """
    named = {f"region {i}": region for i, region in enumerate(regions)}
    arguments.check_tensors("copy_staged", {"staging": staging, **named})
    if not staging.is_contiguous():
        raise ValueError(f"staging must be contiguous; its strides are {staging.stride()}.")
    for part in one.copies:
        check_within(part, regions, staging)
    pull = one.ranges.direction == PULL
    for part in one.copies:
        cache = regions[part.region]
        offset = cache.storage_offset() * cache.element_size() + part.offset
        base = staging.storage_offset() * staging.element_size() + part.staging_offset
        numbers = (offset, base, part.length, *part.steps, *part.staging_steps)
        width = next(w for w in (8, 4, 2, 1) if not any(n % w for n in numbers))
        memory, buffer = _integers(cache, width), _integers(staging, width)
        steps = [step // width for step in part.steps]
        # As many blocks and units as there are at least; none is touched that is not named.
        blocks, units = (int(numbers.max()) + 1 for numbers in (part.blocks, part.units))
        length = part.length // width
        rows = memory.as_strided((blocks, units, part.count, length), (*steps, 1), offset // width)
        items = buffer.as_strided(
            (len(part.blocks), part.count, length),
            (*(step // width for step in part.staging_steps), 1),
            base // width,
        )
        which = [torch.from_numpy(x).to(cache.device) for x in (part.blocks, part.units)]
        if pull:
            rows[which[0], which[1]] = items
        else:
            items.copy_(rows[which[0], which[1]])


def _integers(x: Tensor, width: int) -> Tensor:
    """The whole storage as integers of ``width`` bytes."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    size = x.untyped_storage().nbytes() // width
    return torch.empty(0, dtype=kind, device=x.device).set_(x.untyped_storage(), 0, (size,))

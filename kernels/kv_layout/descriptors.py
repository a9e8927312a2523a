"""From a plan to the flat lists of addresses and lengths that a transfer engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ascend_patch.kernels.kv_layout.checks import (
    Ints,
    check_pairs,
    check_ranks,
    check_reach,
    whole_numbers,
)
from ascend_patch.kernels.kv_layout.geometry import PULL
from ascend_patch.kernels.kv_layout.plan import Piece, Plan
from ascend_patch.kernels.kv_layout.topology import Topology

# Ranges of one call to the engine. Mooncake's TCP transport queues 2048 for a peer, those of other
# threads included; one batch that does not fit fails, and all that come after it.
MOST_AT_ONCE = 256


@dataclass(frozen=True)
class Descriptors:
    """Byte ranges to move between two ranks, int64 [N] each.

    Attributes:
        prefill: Addresses on the prefill rank.
        decode: Addresses on the decode rank.
        lengths: In bytes.
    """

    prefill: Ints
    decode: Ints
    lengths: Ints
    direction: str

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def local(self) -> Ints:
        """The addresses of the side that acts: decode pulls, prefill pushes."""
        return self.decode if self.direction == PULL else self.prefill

    @property
    def remote(self) -> Ints:
        """The addresses of the other side."""
        return self.prefill if self.direction == PULL else self.decode

    @property
    def total_bytes(self) -> int:
        """How much moves."""
        return int(self.lengths.sum())

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """(local, remote, lengths), as Mooncake's batch_transfer_sync_read and _write take them."""
        return self.local.tolist(), self.remote.tolist(), self.lengths.tolist()

    def batches(self, most: int = MOST_AT_ONCE) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """``lists`` in parts of at most ``most`` ranges, one after the other."""
        whole = self.lists()
        for first in range(0, len(self), most):
            local, remote, lengths = (part[first : first + most] for part in whole)
            yield local, remote, lengths


@dataclass(frozen=True)
class Pairs:
    """Which block goes to which, unit by unit: int64 [N] each; a unit as in `plan.Run`."""

    prefill_block: Ints
    prefill_unit: Ints
    decode_block: Ints
    decode_unit: Ints


def match_blocks(
    topology: Topology,
    prefill_blocks: Sequence[int],
    decode_blocks: Sequence[int],
    *,
    tokens: int | None = None,
    cached_blocks: int | None = None,
) -> Pairs:
    """Pair the blocks of a request.

    Args:
        prefill_blocks: All blocks of the prompt on the prefill side, in order; blocks behind its
            end (kept for drafts) count only without ``tokens``.
        decode_blocks: The blocks that decode wants: the last ones of the prompt, after those that
            its prefix cache has.
        tokens: Of the prompt. Needed where block sizes differ or either list may go on behind it.
        cached_blocks: Decode's blocks of the prompt that are not in its list. None: the list ends
            with the prompt, and what is missing is missing at its beginning.

    Raises:
        TypeError: An id or a count is no whole number.
        ValueError: Decode wants more than prefill has, ids are negative, 2**63 or more, or appear
            twice in ``decode_blocks``, or ``tokens`` is missing.
    """
    sizes = topology.prefill.block_size, topology.decode.block_size
    have = whole_numbers("Block ids of prefill", prefill_blocks)
    want = whole_numbers("Block ids of decode", decode_blocks)
    for name, count in (("tokens", tokens), ("cached_blocks", cached_blocks)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"{name} must be a whole number, not {count!r}.")
    if tokens is not None and tokens < 0:
        raise ValueError(f"tokens must be at least 0, not {tokens}.")
    if len(np.unique(want)) != len(want):
        raise ValueError(f"A block is written twice: decode's block ids are {want.tolist()}.")
    if tokens is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Blocks have {sizes[0]} tokens in prefill and {sizes[1]} in decode; which of them "
                "belong together depends on the prompt's length: give tokens."
            )
        tokens = len(have) * sizes[0]
    have_count, want_count = (-(-tokens // size) for size in sizes)
    if len(have) < have_count:
        raise ValueError(
            f"{tokens} tokens are {have_count} blocks of {sizes[0]}; prefill gave {len(have)}."
        )
    if cached_blocks is None:
        cached_blocks = want_count - len(want)
    if not 0 <= cached_blocks <= want_count:
        raise ValueError(
            f"{tokens} tokens are {want_count} blocks of {sizes[1]}; decode wants {len(want)} and "
            f"has {cached_blocks}."
        )
    want = want[: want_count - cached_blocks]
    unit = min(sizes)
    each = sizes[1] // unit
    count = min(len(want) * each, -(-tokens // unit) - cached_blocks * each)
    numbers = np.arange(max(count, 0), dtype=np.int64)
    place, source = numbers, numbers + cached_blocks * each
    per_prefill = sizes[0] // unit
    return Pairs(
        have[source // per_prefill], source % per_prefill, want[place // each], place % each
    )


def descriptors(
    plan: Plan,
    prefill_rank: int,
    decode_rank: int,
    pairs: Pairs,
    *,
    prefill_bases: Sequence[int],
    decode_bases: Sequence[int],
    prefill_strides: Sequence[int] | None = None,
    decode_strides: Sequence[int] | None = None,
    prefill_num_blocks: int | None = None,
    decode_num_blocks: int | None = None,
    staged: bool = False,
) -> Descriptors:
    """The byte ranges that a request moves between two ranks.

    Args:
        pairs: What `match_blocks` found.
        prefill_bases: Address of block 0 of each region of the prefill rank, in bytes.
        decode_bases: The same of the decode rank.
        prefill_strides: Bytes from a block to the next in each region; None: blocks are adjacent.
        decode_strides: The same of the decode rank.
        prefill_num_blocks: Blocks of each region; block ids are held against it where it is given.
        decode_num_blocks: The same of the decode rank.
        staged: Leave out what `staged_rounds` takes through a buffer.

    Returns:
        Ranges, joined where they are adjacent on both sides. Empty where the two have nothing to
        exchange.

    Raises:
        TypeError: An address, a stride or an id is no whole number.
        ValueError: A list does not have one entry for each region of its rank, a stride is shorter
            than a block, an id, a unit or a rank is out of range, or a range ends beyond 2**63.
    """
    topology = plan.topology
    check_ranks(topology, prefill_rank, decode_rank)
    check_pairs(topology, pairs)
    origin = side_arrays(
        "prefill", topology.prefill.regions(prefill_rank), prefill_bases, prefill_strides
    )
    target = side_arrays(
        "decode", topology.decode.regions(decode_rank), decode_bases, decode_strides
    )
    for name, blocks, limit in (
        ("prefill", pairs.prefill_block, prefill_num_blocks),
        ("decode", pairs.decode_block, decode_num_blocks),
    ):
        if limit is not None and len(blocks) and blocks.max() >= limit:
            raise ValueError(f"Block {blocks.max()} is not on the {name} side: it has {limit}.")
    check_reach("prefill", *origin, pairs.prefill_block)
    check_reach("decode", *target, pairs.decode_block)
    transfer = plan.transfer(prefill_rank, decode_rank)
    found = [
        part
        for piece in (transfer.pieces if transfer is not None else ())
        for part in _piece(listed(piece, plan.direction, staged), pairs, *origin, *target)
    ]
    if not found:
        nothing = np.zeros(0, np.int64)
        return Descriptors(nothing, nothing, nothing, plan.direction)
    sizes = [size for *_, parts in found for size in parts]
    prefill, decode, lengths = (np.concatenate([one[i] for one in found]) for i in range(3))
    return Descriptors(*joined(prefill, decode, lengths, sizes), plan.direction)


def listed(piece: Piece, direction: str, staged: bool) -> Piece:
    """The piece without the runs that go through a buffer."""
    if not staged:
        return piece
    return replace(piece, runs=tuple(r for r in piece.runs if not r.is_staged(direction)))


def side_arrays(
    name: str, sizes: tuple[int, ...], bases: Sequence[int], strides: Sequence[int] | None
) -> tuple[Ints, Ints]:
    """(addresses, strides) of a rank's regions, checked against the plan."""
    places = whole_numbers(f"Addresses of the {name} rank", bases)
    steps = sizes if strides is None else strides
    given = whole_numbers(f"Strides of the {name} rank", steps)
    if len(places) != len(sizes) or len(given) != len(sizes):
        raise ValueError(
            f"The {name} rank has {len(sizes)} regions by the plan; {len(places)} addresses and "
            f"{len(given)} strides were given: the two sides do not hold the same layers."
        )
    if any(a < b for a, b in zip(given, sizes, strict=True)):
        raise ValueError(
            f"Blocks of the {name} rank are {sizes} bytes, and strides are "
            f"{tuple(map(int, given))}."
        )
    return places, given


def _piece(
    piece: Piece,
    pairs: Pairs,
    prefill_bases: Ints,
    prefill_strides: Ints,
    decode_bases: Ints,
    decode_strides: Ints,
) -> list[tuple[Any, ...]]:
    """(prefill addresses, decode addresses, lengths) for each pair of regions within a layer.

    And how many of them each layer has.
    """
    found = []
    layers = np.asarray(piece.layers, np.int64)
    for regions in dict.fromkeys((run.prefill_region, run.decode_region) for run in piece.runs):
        runs = [r for r in piece.runs if (r.prefill_region, r.decode_region) == regions]
        first = [layers[:, side] + region for side, region in enumerate(regions)]

        def spread(base: str, step: str, runs: Any = runs) -> Ints:
            ranges = [getattr(r, base) + getattr(r, step) * np.arange(r.count) for r in runs]
            return np.asarray(np.concatenate(ranges), np.int64)

        def repeated(field: str, runs: Any = runs) -> Ints:
            counts = [r.count for r in runs]
            values = np.asarray([getattr(r, field) for r in runs], np.int64)
            return np.repeat(values, counts)

        source = spread("prefill_offset", "prefill_step")
        place = spread("decode_offset", "decode_step")
        source = source + pairs.prefill_unit[:, None] * repeated("prefill_unit_step")
        place = place + pairs.decode_unit[:, None] * repeated("decode_unit_step")
        starts = prefill_strides[first[0]][:, None] * pairs.prefill_block
        places = decode_strides[first[1]][:, None] * pairs.decode_block
        starts = (prefill_bases[first[0]][:, None] + starts)[:, :, None] + source
        places = (decode_bases[first[1]][:, None] + places)[:, :, None] + place
        lengths = np.broadcast_to(repeated("length"), starts.shape)
        sizes = [starts[0].size] * len(layers)
        found.append((starts.ravel(), places.ravel(), lengths.ravel(), sizes))
    return found


def joined(
    prefill: Ints, decode: Ints, lengths: Ints, sizes: Sequence[int]
) -> tuple[Ints, Ints, Ints]:
    """One range for neighbours in the lists that are adjacent on both sides.

    Args:
        sizes: How many entries belong to one region on each side. Regions are registered one by
            one, and a range that leaves one is an error to the engine, also where the next follows.
    """
    if not len(lengths):
        return prefill, decode, lengths
    apart = (np.diff(prefill) != lengths[:-1]) | (np.diff(decode) != lengths[:-1])
    ends = np.cumsum(np.asarray(sizes, np.int64))[:-1]
    apart[ends[(ends > 0) & (ends < len(lengths))] - 1] = True
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    return prefill[first], decode[first], np.add.reduceat(lengths, first)

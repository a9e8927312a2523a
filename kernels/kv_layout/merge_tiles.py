"""How the merge of a block is cut into programs that do not get into each other's way.

A merge is a permutation of a block's *rows*, each as many elements as the shards' common number of
heads. In place, a program may only write where no other program has yet to read: it takes rows that
are exchanged among themselves, whole cycles of the permutation, reads them all, and then writes. A
program takes as many cycles as fill it, and where one cycle is too long for whole rows, a part of
the columns of its rows: columns never mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tiles:
    """Programs of a block: ``groups`` of up to ``rows`` rows, times ``chunks`` of columns.

    Attributes:
        row: Elements of a row.
        rows: A power of two.
        columns: Elements of a row that a program takes at a time, a power of two.
    """

    row: int
    rows: int
    columns: int
    groups: int

    @property
    def chunks(self) -> int:
        """Programs that share a group's rows."""
        return -(-self.row // self.columns)

    @property
    def programs(self) -> int:
        """Of a block."""
        return self.groups * self.chunks


def permutation(block_size: int, shards: tuple[int, ...]) -> Ints:
    """int32 [rows]: where each row of a block of shards belongs; a row is `heads_of_row` heads."""
    common = heads_of_row(shards)
    heads = sum(shards) // common
    found, first = [], 0
    for count in (shard // common for shard in shards):
        tokens = np.arange(block_size, dtype=np.int32)[:, None] * heads
        found.append((tokens + first + np.arange(count, dtype=np.int32)).ravel())
        first += count
    return np.concatenate(found).astype(np.int32)


def heads_of_row(shards: tuple[int, ...]) -> int:
    """Heads that stay together in all shards."""
    return gcd(*shards)


def cycles(target: Ints) -> list[list[int]]:
    """The cycles of a permutation but for those of one row, longest first."""
    found, seen = [], np.zeros(len(target), bool)
    for first in range(len(target)):
        cycle, row = [], first
        while not seen[row]:
            seen[row] = True
            cycle.append(row)
            row = int(target[row])
        if len(cycle) > 1:
            found.append(cycle)
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=256)
def row_groups(block_size: int, shards: tuple[int, ...], rows: int, closed: bool) -> Ints:
    """int32 [2, groups, rows]: the rows that each program reads, and where they go; -1 is none.

    ``rows`` grows to the power of two that holds the longest cycle. Without ``closed`` rows are
    taken as they come, those that stay included: for shards that lie elsewhere.
    """
    target = permutation(block_size, shards)
    found = cycles(target) if closed else [[row] for row in range(len(target))]
    rows = max(rows, 1 << (max(map(len, found), default=1) - 1).bit_length())
    groups: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free rows -> groups with as many
    for cycle in found:
        fits = min(
            (free for free, which in room.items() if which and free >= len(cycle)), default=0
        )
        if fits:
            group = room[fits].pop()
        else:
            group, fits = len(groups), rows
            groups.append([])
        groups[group] += cycle
        room.setdefault(fits - len(cycle), []).append(group)
    table = np.full((2, len(groups), rows), -1, np.int32)
    for number, members in enumerate(groups):
        taken = sorted(members)
        table[0, number, : len(taken)] = taken
        table[1, number, : len(taken)] = target[taken]
    return table


def cuda_tiles(
    block_size: int, shards: tuple[int, ...], row: int, itemsize: int, closed: bool
) -> tuple[Tiles, Ints]:
    """Tiles of about `TILE_BYTES`, and their rows, for rows of ``row`` elements."""
    row_bytes = row * itemsize
    total = block_size * sum(shards) // heads_of_row(shards)
    rows = min(max(1, TILE_BYTES // _power(row_bytes)), _power(total))
    table = row_groups(block_size, shards, rows, closed)
    rows = table.shape[2]
    fits = max(LEAST_BYTES, TILE_BYTES // rows) // itemsize
    return Tiles(row, rows, max(1, min(_power(row), fits)), table.shape[1]), table


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Of a program: four of them fill half of an SM's registers. And of a row of it, one sector.
TILE_BYTES, LEAST_BYTES = 32 << 10, 32

"""What becomes of a block's bytes between a prefill rank and a decode rank.

Three cases, by layout:

- Heads are apart in memory on both sides (HND, or a single head): byte ranges are copied to where
  they belong.
- Tokens are apart on both (NHD) and a prefill rank's heads are a part of decode's: each prefill
  rank's block lands as it is, one *shard* behind the other in decode's block ("pull-major"), and
  `merge_head_shards_` makes one block of them. HND shards that land in an NHD block are single
  heads to it.
- A decode rank needs some of the heads of a prefill rank's NHD block: a byte range for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ascend_patch.kernels.kv_layout.topology import HND, NHD, HeadRange, LayerGroup, Topology

PULL, PUSH = "pull", "push"


@dataclass(frozen=True)
class Run:
    """``count`` byte ranges of a block, for each pair of block units.

    A unit is as many tokens as the smaller block size. The i-th range is ``length`` bytes at
    ``prefill_offset + i * prefill_step`` of a prefill block; unit u of a block that holds several
    begins ``u * prefill_unit_step`` further. Decode's likewise. Regions count within a layer.
    With ``by_token`` each range is some of the heads of a token.
    """

    prefill_region: int
    decode_region: int
    prefill_offset: int
    decode_offset: int
    length: int
    count: int = 1
    prefill_step: int = 0
    decode_step: int = 0
    prefill_unit_step: int = 0
    decode_unit_step: int = 0
    by_token: bool = False

    def is_staged(self, direction: str) -> bool:
        """May a buffer make one range of these? What is pushed as one must arrive as one."""
        return self.by_token and (direction == PULL or self.decode_step == self.length)


def _counts(topology: Topology, group: LayerGroup, decode_tp: int) -> tuple[int, list[int], int]:
    """Heads of a prefill rank, of its parts in the decode rank's range, and of that."""
    needed = topology.decode.heads(group, decode_tp)
    count = topology.prefill.heads(group, 0).count
    overlaps = [
        min(first + count, needed.end) - max(first, needed.first)
        for first in range(needed.first // count * count, needed.end, count)
    ]
    return count, overlaps, needed.count


def shards(topology: Topology, group: LayerGroup, decode_tp: int) -> tuple[int, ...]:
    """Heads of the shards that land in a decode block; one shard: they land in their places."""
    held, overlaps, needed = _counts(topology, group, decode_tp)
    if topology.decode.layout == HND or needed == 1:
        return (needed,)
    if topology.prefill.layout == HND or held == 1:
        return (1,) * needed
    # All of them are taken token by token, and so can go straight to their places.
    if all(count < held for count in overlaps):
        return (needed,)
    return tuple(overlaps)


def runs(
    topology: Topology, group: LayerGroup, prefill_tp: int, decode_tp: int
) -> tuple[range, tuple[Run, ...]]:
    """The heads, and their byte ranges in a block of each side, of all parts of a layer."""
    have = topology.prefill.heads(group, prefill_tp)
    need = topology.decode.heads(group, decode_tp)
    heads = range(max(have.first, need.first), min(have.end, need.end))
    merged = len(shards(topology, group, decode_tp)) > 1
    found: list[Run] = []
    for part, width in enumerate(group.widths):
        row = width * topology.prefill.itemsize
        prefill_region, prefill_base = topology.prefill.part_place(group, part)
        decode_region, decode_base = topology.decode.part_place(group, part)
        for run in _part(topology, have, need, heads, merged, row):
            found.append(
                replace(
                    run,
                    prefill_region=prefill_region,
                    decode_region=decode_region,
                    prefill_offset=prefill_base + run.prefill_offset,
                    decode_offset=decode_base + run.decode_offset,
                )
            )
    return heads, tuple(found)


def _part(
    topology: Topology, have: HeadRange, need: HeadRange, heads: range, merged: bool, row: int
) -> Iterator[Run]:
    """Byte ranges of one part whose token of one head is ``row`` bytes."""
    prefill, decode = topology.prefill.block_size, topology.decode.block_size
    unit, count = min(prefill, decode), len(heads)
    source, place = heads.start - have.first, heads.start - need.first
    by_token = topology.prefill.layout == NHD and have.count > 1
    if not by_token:
        # Heads are apart in the prefill block, and in decode's or in its shards of one head.
        offsets = (source * prefill * row, place * decode * row)
        if prefill == decode:
            yield Run(0, 0, *offsets, count * unit * row)
            return
        steps = (prefill * row, decode * row, unit * row, unit * row)
        yield Run(0, 0, *offsets, unit * row, count, *steps)
        return
    # Into a shard of these heads alone, or straight among the others of the block.
    into = count if merged else need.count
    start = place * (decode if merged else 1) * row
    units = (unit * have.count * row, unit * into * row)
    if count == have.count == into:
        yield Run(0, 0, source * row, start, unit * count * row, 1, 0, 0, *units)
        return
    rows = (have.count * row, into * row)
    yield Run(0, 0, source * row, start, count * row, unit, *rows, *units, by_token=True)

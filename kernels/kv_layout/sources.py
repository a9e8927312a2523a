"""Which prefill ranks a decode rank reads from, of those that hold the heads which it needs."""

from __future__ import annotations

from collections.abc import Sequence

from ascend_patch.kernels.kv_layout.topology import HeadRange, LayerGroup, Side, Topology


def _ranges(side: Side, group: LayerGroup, first: int, end: int) -> range:
    """The numbers of the head ranges of a side that heads ``first`` to ``end - 1`` are in."""
    count = side.heads(group, 0).count
    return range(first // count, (end - 1) // count + 1)


def _ranks_of(side: Side, group: LayerGroup, ranges: range) -> range:
    """The ranks that hold these head ranges."""
    replicas = len(side.heads(group, 0).ranks)
    return range(ranges.start * replicas, ranges.stop * replicas)


def readers_of(topology: Topology, prefill_tp: int) -> tuple[int, ...]:
    """The decode ranks that need heads which a prefill rank holds."""
    found: set[int] = set()
    for group in topology.shared:
        held = topology.prefill.heads(group, prefill_tp)
        wanted = _ranges(topology.decode, group, held.first, held.end)
        found.update(_ranks_of(topology.decode, group, wanted))
    return tuple(sorted(found))


def sources_of(topology: Topology, decode_tp: int, turn: int) -> dict[str, tuple[int, ...]]:
    """For each group the prefill ranks of a stage that a decode rank reads from, by head."""
    found: dict[str, tuple[int, ...]] = {}
    used: set[int] = set()
    # Where there is a choice, a rank that is needed for other layers is better than one more.
    for group in sorted(topology.shared, key=lambda g: -g.kv_heads):
        needed = topology.decode.heads(group, decode_tp)
        each = topology.prefill.heads(group, 0)
        found[group.name] = tuple(
            _replica(topology, group, number * each.count, each, decode_tp, turn, used)
            for number in _ranges(topology.prefill, group, needed.first, needed.end)
        )
        used.update(found[group.name])
    return found


def _replica(
    topology: Topology,
    group: LayerGroup,
    first: int,
    each: HeadRange,
    decode_tp: int,
    turn: int,
    used: set[int],
) -> int:
    """One of the ranks that hold a range: decode ranks that need it are spread over them.

    Args:
        first: The first head of the range.
        each: Another range of that side, of the same size and on as many ranks.
    """
    replicas, number = len(each.ranks), first // each.count
    ranks: Sequence[int] = range(number * replicas, (number + 1) * replicas)
    if topology.chosen is not None:
        ranks = sorted({rank for rank in topology.chosen[decode_tp] if rank in ranks})
    ranks = sorted(rank for rank in used if rank in ranks) or ranks
    wanted = _ranges(topology.decode, group, first, first + each.count)
    readers = _ranks_of(topology.decode, group, wanted)
    return ranks[(readers.index(decode_tp) * len(ranks) // len(readers) + turn) % len(ranks)]

"""Which ranks talk, and which bytes of a block go where: a pure function of two sides.

A decode rank needs a range of KV heads of each layer. Decided here, whatever the direction: which
prefill ranks they come from; what a block's bytes look like on both is decided in `geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ascend_patch.kernels.kv_layout import geometry
from ascend_patch.kernels.kv_layout.geometry import PULL, PUSH, Run
from ascend_patch.kernels.kv_layout.refusals import Refusal, refuse
from ascend_patch.kernels.kv_layout.topology import (
    HeadRange,
    LayerGroup,
    StageGroup,
    Topology,
)


@dataclass(frozen=True)
class Piece:
    """What one decode rank takes from one prefill rank, of the layers of a group that both hold.

    Attributes:
        layers: For each layer the numbers of its first region on the prefill and decode rank.
        runs: Byte ranges, the same for each of the layers.
        heads: The KV heads, counted in the model.
    """

    group: str
    layers: tuple[tuple[int, int], ...]
    runs: tuple[Run, ...]
    heads: range


@dataclass(frozen=True)
class Transfer:
    """All that moves from one prefill rank to one decode rank (each ``stage * tp + tp_rank``)."""

    prefill_rank: int
    decode_rank: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Merge:
    """What is left to do on a decode rank when all bytes of a request have landed.

    Each block of the regions holds parts of [shard, block_size, heads of the shard, width], and
    must hold [block_size, heads, width].

    Attributes:
        shards: Heads of each shard, in their order in the block.
        widths: Elements of a head in each part.
        regions: Regions of the decode rank, layer by layer.
    """

    group: str
    shards: tuple[int, ...]
    widths: tuple[int, ...]
    regions: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a request's blocks come from prefill to decode.

    Attributes:
        direction: `pull`: decode ranks read, their side is local. `push`: prefill ranks write.
        transfers: Sorted by decode rank, then prefill rank.
    """

    topology: Topology
    direction: str
    turn: int
    transfers: tuple[Transfer, ...]

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], Transfer]:
        return {(t.prefill_rank, t.decode_rank): t for t in self.transfers}

    def transfer(self, prefill_rank: int, decode_rank: int) -> Transfer | None:
        """What moves between two ranks; None if nothing does."""
        return self._by_pair.get((prefill_rank, decode_rank))

    def sources(self, decode_rank: int) -> tuple[int, ...]:
        """The prefill ranks that a decode rank's bytes come from: how many it must wait for."""
        return tuple(t.prefill_rank for t in self.transfers if t.decode_rank == decode_rank)

    def targets(self, prefill_rank: int) -> tuple[int, ...]:
        """The decode ranks that a prefill rank's blocks go to; it may free them after the last."""
        return tuple(t.decode_rank for t in self.transfers if t.prefill_rank == prefill_rank)

    @property
    def idle_prefill_ranks(self) -> tuple[int, ...]:
        """Prefill ranks that nobody reads from: they may free a request's blocks at once."""
        busy = {t.prefill_rank for t in self.transfers}
        return tuple(r for r in range(self.topology.prefill.world) if r not in busy)

    def merges(self, decode_rank: int) -> tuple[Merge, ...]:
        """What a decode rank has to merge, one for each group of layers; often nothing."""
        found = []
        decode = self.topology.decode
        for held in decode.stage_groups(decode_rank // decode.tp):
            parts = geometry.shards(self.topology, held.group, decode_rank % decode.tp)
            if len(parts) > 1:
                count = len(held.layers) * held.regions_each
                regions = range(held.first_region, held.first_region + count)
                found.append(Merge(held.group.name, parts, held.group.widths, tuple(regions)))
        return tuple(found)

    @cached_property
    def descriptors_per_block(self) -> int:
        """The most byte ranges that one decode block of one layer takes from one prefill rank.

        Counted before ranges of neighbouring blocks are joined. At most
        ``parts * max(block_size, KV heads of a rank * units of a block)``.
        """
        prefill, decode = self.topology.prefill.block_size, self.topology.decode.block_size
        pieces = [piece for transfer in self.transfers for piece in transfer.pieces]
        most = max((sum(run.count for run in piece.runs) for piece in pieces), default=0)
        return most * max(1, decode // prefill)


@lru_cache(maxsize=4096)
def plan_transfers(topology: Topology, *, direction: str, turn: int = 0) -> Plan | Refusal:
    """Plan the transfer of a request between two sides.

    Args:
        topology: The two sides; ``topology.chosen`` limits the prefill ranks of each decode rank.
        direction: `pull` (vllm-ascend: decode ranks read from prefill ranks) or `push` (vLLM's
            MooncakeConnector: prefill ranks write to decode ranks). The bytes are the same; what
            differs is which side is local.
        turn: Any number that both sides agree on for a request, such as a hash of its id: where
            prefill ranks hold replicas, requests of different turns read from different ones. The
            same for all turns that are equal modulo prefill's TP.

    Returns:
        The plan, or the refusal of `refusals.REFUSALS` that says why there is none.

    Raises:
        ValueError: The direction is neither.
    """
    if direction not in (PULL, PUSH):
        raise ValueError(f"direction is {direction!r}; it must be {PULL!r} or {PUSH!r}.")
    refusal = refuse(topology)
    if refusal is not None:
        return refusal
    prefill, decode = topology.prefill, topology.decode
    found: dict[tuple[int, int], list[Piece]] = {}
    for decode_tp in range(decode.tp):
        sources = _sources(topology, decode_tp, turn)
        for decode_stage in range(decode.pp):
            for target in decode.stage_groups(decode_stage):
                for stage in range(prefill.pp):
                    for origin in prefill.stage_groups(stage):
                        layers = _layers(origin, target)
                        for tp_rank in sources[target.group.name] if layers else ():
                            heads, runs = geometry.runs(topology, target.group, tp_rank, decode_tp)
                            pair = (
                                decode_stage * decode.tp + decode_tp,
                                stage * prefill.tp + tp_rank,
                            )
                            piece = Piece(target.group.name, layers, runs, heads)
                            found.setdefault(pair, []).append(piece)
    transfers = (Transfer(p, d, tuple(found[d, p])) for d, p in sorted(found))
    return Plan(topology, direction, turn, tuple(transfers))


def _layers(origin: StageGroup, target: StageGroup) -> tuple[tuple[int, int], ...]:
    """First regions of the layers that both hold."""
    if origin.group.name != target.group.name:
        return ()
    first = max(origin.layers.start, target.layers.start)
    end = min(origin.layers.stop, target.layers.stop)
    return tuple((origin.region(layer), target.region(layer)) for layer in range(first, end))


def _sources(topology: Topology, decode_tp: int, turn: int) -> dict[str, tuple[int, ...]]:
    """For each group the prefill ranks of a stage that a decode rank reads from, by head."""
    found: dict[str, tuple[int, ...]] = {}
    used: set[int] = set()
    # Where there is a choice, a rank that is needed for other layers is better than one more.
    for group in sorted(topology.shared, key=lambda g: -g.kv_heads):
        needed = topology.decode.heads(group, decode_tp)
        chosen = []
        for held in topology.prefill.head_ranges(group):
            if held.first < needed.end and needed.first < held.end:
                chosen.append(_replica(topology, group, held, decode_tp, turn, used))
        found[group.name] = tuple(chosen)
        used.update(chosen)
    return found


def _replica(
    topology: Topology,
    group: LayerGroup,
    held: HeadRange,
    decode_tp: int,
    turn: int,
    used: set[int],
) -> int:
    """One of the ranks that hold a range: decode ranks that need it are spread over them."""
    ranks: list[int] = list(held.ranks)
    if topology.chosen is not None:
        ranks = [rank for rank in ranks if rank in topology.chosen[decode_tp]]
    ranks = [rank for rank in ranks if rank in used] or ranks
    readers = [
        rank
        for wanted in topology.decode.head_ranges(group)
        if wanted.first < held.end and held.first < wanted.end
        for rank in wanted.ranks
    ]
    return ranks[(readers.index(decode_tp) * len(ranks) // len(readers) + turn) % len(ranks)]

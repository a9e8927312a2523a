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
from ascend_patch.kernels.kv_layout.sources import readers_of, sources_of
from ascend_patch.kernels.kv_layout.topology import (
    LayerGroup,
    StageGroup,
    Topology,
)

# A group of layers that two stages both hold, and for each layer its first region on either.
Shared = tuple[LayerGroup, tuple[tuple[int, int], ...]]


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

    What is asked about a rank is computed for that rank: a pair of servers with thousands of ranks
    is in no call of a connector planned as a whole, because its sizes come from the network.

    Attributes:
        direction: `pull`: decode ranks read, their side is local. `push`: prefill ranks write.
    """

    topology: Topology
    direction: str
    turn: int

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All of them, sorted by decode rank, then prefill rank."""
        found = (
            self.transfer(source, rank)
            for rank in range(self.topology.decode.world)
            for source in self.sources(rank)
        )
        return tuple(one for one in found if one is not None)

    @cached_property
    def _by_pair(self) -> dict[tuple[int, int], Transfer | None]:
        return {}

    @cached_property
    def _by_prefill(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def _by_stages(self) -> dict[tuple[int, int], tuple[Shared, ...]]:
        return {}

    def transfer(self, prefill_rank: int, decode_rank: int) -> Transfer | None:
        """What moves between two ranks; None if nothing does."""
        pair = prefill_rank, decode_rank
        if pair not in self._by_pair:
            self._by_pair[pair] = self._transfer(*pair)
        return self._by_pair[pair]

    def _transfer(self, prefill_rank: int, decode_rank: int) -> Transfer | None:
        (stage, tp_rank), (decode_stage, decode_tp) = (
            divmod(prefill_rank, self.topology.prefill.tp),
            divmod(decode_rank, self.topology.decode.tp),
        )
        sources = sources_of(self.topology, decode_tp, self.turn)
        pieces = []
        for group, layers in self._shared(stage, decode_stage):
            if tp_rank in sources[group.name]:
                heads, runs = geometry.runs(self.topology, group, tp_rank, decode_tp)
                pieces.append(Piece(group.name, layers, runs, heads))
        return Transfer(prefill_rank, decode_rank, tuple(pieces)) if pieces else None

    def _shared(self, stage: int, decode_stage: int) -> tuple[Shared, ...]:
        """The groups that two stages both hold layers of, and those layers."""
        stages = stage, decode_stage
        if stages not in self._by_stages:
            self._by_stages[stages] = tuple(
                (target.group, layers)
                for target in self.topology.decode.stage_groups(decode_stage)
                for origin in self.topology.prefill.stage_groups(stage)
                if (layers := _layers(origin, target))
            )
        return self._by_stages[stages]

    def sources(self, decode_rank: int) -> tuple[int, ...]:
        """The prefill ranks that a decode rank's bytes come from: how many it must wait for."""
        prefill = self.topology.prefill
        decode_stage, decode_tp = divmod(decode_rank, self.topology.decode.tp)
        ranks = sources_of(self.topology, decode_tp, self.turn)
        return tuple(
            sorted(
                {
                    stage * prefill.tp + rank
                    for stage in range(prefill.pp)
                    for group, _ in self._shared(stage, decode_stage)
                    for rank in ranks[group.name]
                }
            )
        )

    def targets(self, prefill_rank: int) -> tuple[int, ...]:
        """The decode ranks that a prefill rank's blocks go to; it may free them after the last."""
        if prefill_rank not in self._by_prefill:
            self._by_prefill[prefill_rank] = self._targets(prefill_rank)
        return self._by_prefill[prefill_rank]

    def _targets(self, prefill_rank: int) -> tuple[int, ...]:
        decode = self.topology.decode
        stage, tp_rank = divmod(prefill_rank, self.topology.prefill.tp)
        found = []
        for decode_tp in readers_of(self.topology, tp_rank):
            sources = sources_of(self.topology, decode_tp, self.turn)
            named = {name for name, ranks in sources.items() if tp_rank in ranks}
            for decode_stage in range(decode.pp) if named else ():
                shared = self._shared(stage, decode_stage)
                if any(group.name in named for group, _ in shared):
                    found.append(decode_stage * decode.tp + decode_tp)
        return tuple(sorted(found))

    @cached_property
    def idle_prefill_ranks(self) -> tuple[int, ...]:
        """Prefill ranks that nobody reads from: they may free a request's blocks at once."""
        prefill, decode = self.topology.prefill, self.topology.decode
        read: dict[str, set[int]] = {group.name: set() for group in self.topology.shared}
        for decode_tp in range(decode.tp):
            for name, ranks in sources_of(self.topology, decode_tp, self.turn).items():
                read[name].update(ranks)
        idle = []
        for stage in range(prefill.pp):
            held = [held.group.name for held in prefill.stage_groups(stage)]
            busy = set().union(*(read[name] for name in held if name in read))
            first = stage * prefill.tp
            idle += [first + rank for rank in range(prefill.tp) if rank not in busy]
        return tuple(idle)

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


# A server meets few peers, and their sizes come from the network: what is kept is little.
@lru_cache(maxsize=128)
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
    return Plan(topology, direction, turn)


def _layers(origin: StageGroup, target: StageGroup) -> tuple[tuple[int, int], ...]:
    """First regions of the layers that both hold."""
    if origin.group.name != target.group.name:
        return ()
    first = max(origin.layers.start, target.layers.start)
    end = min(origin.layers.stop, target.layers.stop)
    return tuple((origin.region(layer), target.region(layer)) for layer in range(first, end))

"""What two sides of a KV transfer are: how each cuts the layers and heads of one model to ranks.

Nothing here imports torch or vLLM: a connector fills these in from its configuration and from what
its peer said in the handshake.

A rank holds, for each of its layers, the caches of the layer's *parts*: K and V, or whatever else
a token leaves behind (the latent and the rotary part of MLA). A *region* is one registered piece of
memory, a row of equal blocks: one for each part where ``combined`` is false, else one for the layer
with its parts one after the other in each block. In a block a part is [block_size, heads, width]
(NHD) or [heads, block_size, width] (HND). A rank's regions are numbered layer by layer, part by
part: the order in which vLLM and vllm-ascend register them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

NHD, HND = "NHD", "HND"
LAYOUTS = (NHD, HND)


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers with the same heads.

    Attributes:
        layers: How many.
        kv_heads: In the whole model, not on a rank. A latent (MLA) cache is one head, which every
            rank holds.
        widths: Elements of a token of one head in each part: (128, 128) for K and V, (512, 64) for
            MLA on Ascend, (576,) for MLA in vLLM.
        name: Says which group of the peer is the same: "model", or a draft model's.
        draft: Layers of a draft model (MTP, EAGLE): on the last pipeline stage, after its others.
    """

    layers: int
    kv_heads: int
    widths: tuple[int, ...]
    name: str = "model"
    draft: bool = False


@dataclass(frozen=True)
class HeadRange:
    """KV heads ``first`` to ``first + count - 1`` of a group, held alike by ``ranks``."""

    first: int
    count: int
    ranks: range

    @property
    def end(self) -> int:
        """One past the last head."""
        return self.first + self.count


@dataclass(frozen=True)
class Side:
    """One side of a transfer: prefill or decode.

    Attributes:
        groups: The layers, those of draft models last.
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        block_size: Tokens of a block.
        layout: `NHD` or `HND`.
        combined: A block holds all parts of a layer, one after the other. False: each part has a
            tensor of its own; a cache [2, num_blocks, ...] is two such.
        dtype: Of the cache, such as "bfloat16".
        itemsize: Bytes of an element.
        stages: Layers of each pipeline stage, draft layers not counted; empty is vLLM's default:
            as equal as can be, what remains to the stages before the last one.
        context_parallel: Prefill or decode context parallel size.
        storage: "plain", or the name of a format that orders elements otherwise, such as "NZ".
        kv_cache_groups: vLLM's KV cache groups; with several a request has several block lists.
    """

    groups: tuple[LayerGroup, ...]
    tp: int
    pp: int = 1
    block_size: int = 128
    layout: str = NHD
    combined: bool = False
    dtype: str = "bfloat16"
    itemsize: int = 2
    stages: tuple[int, ...] = ()
    context_parallel: int = 1
    storage: str = "plain"
    kv_cache_groups: int = 1

    @property
    def world(self) -> int:
        """Ranks; a rank is ``stage * tp + tp_rank``."""
        return self.tp * self.pp

    @property
    def layers(self) -> int:
        """Layers of the model, those of draft models not counted."""
        return sum(group.layers for group in self.groups if not group.draft)

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """How many layers each stage holds. Source: vLLM's `get_pp_indices`."""
        if self.stages:
            return self.stages
        each, rest = divmod(self.layers, self.pp)
        given = [each] * self.pp
        for i in range(2, rest + 2):
            given[-i] += 1
        return tuple(given)

    def group(self, name: str) -> LayerGroup | None:
        """The group of that name."""
        return next((group for group in self.groups if group.name == name), None)

    def head_ranges(self, group: LayerGroup) -> tuple[HeadRange, ...]:
        """How a group's heads are cut: equal ranges, each on one rank or on equally many.

        Source: vLLM's `QKVParallelLinear`: rank r holds range ``r // replicas``.
        """
        ranges = min(self.tp, group.kv_heads)
        replicas, count = self.tp // ranges, group.kv_heads // ranges
        return tuple(
            HeadRange(i * count, count, range(i * replicas, (i + 1) * replicas))
            for i in range(ranges)
        )

    def heads(self, group: LayerGroup, tp_rank: int) -> HeadRange:
        """The range that a tensor parallel rank holds."""
        ranges = min(self.tp, group.kv_heads)
        replicas, count = self.tp // ranges, group.kv_heads // ranges
        number = tp_rank // replicas
        return HeadRange(number * count, count, range(number * replicas, (number + 1) * replicas))

    def part_bytes(self, group: LayerGroup) -> tuple[int, ...]:
        """Bytes of each part in a block of one rank."""
        tokens = self.block_size * max(1, group.kv_heads // self.tp)
        return tuple(tokens * width * self.itemsize for width in group.widths)

    def region_bytes(self, group: LayerGroup) -> tuple[int, ...]:
        """Bytes of a block in each region of a layer."""
        parts = self.part_bytes(group)
        return (sum(parts),) if self.combined else parts

    def part_place(self, group: LayerGroup, part: int) -> tuple[int, int]:
        """(region of the layer, byte offset in its block) of a part."""
        return (0, sum(self.part_bytes(group)[:part])) if self.combined else (part, 0)

    def stage_groups(self, stage: int) -> tuple[StageGroup, ...]:
        """What a stage holds of each group, in the order of its regions."""
        first = sum(self.stage_layers[:stage])
        end = first + self.stage_layers[stage]
        found, before, region = [], 0, 0
        for group in self.groups:
            if group.draft:
                held = range(group.layers if stage == self.pp - 1 else 0)
            else:
                held = range(max(first - before, 0), min(end - before, group.layers))
                before += group.layers
            if held:
                each = len(self.region_bytes(group))
                found.append(StageGroup(group, held, region, each))
                region += each * len(held)
        return tuple(found)

    def regions(self, rank: int) -> tuple[int, ...]:
        """Bytes of a block in each region of a rank, in the order of its regions."""
        found: tuple[int, ...] = ()
        for held in self.stage_groups(rank // self.tp):
            found += self.region_bytes(held.group) * len(held.layers)
        return found


@dataclass(frozen=True)
class StageGroup:
    """The layers of a group (counted in the group) on one stage, and where their regions begin."""

    group: LayerGroup
    layers: range
    first_region: int
    regions_each: int

    def region(self, layer: int) -> int:
        """The first region of a layer of the group."""
        return self.first_region + (layer - self.layers.start) * self.regions_each


@dataclass(frozen=True)
class Topology:
    """Two sides of a transfer.

    Attributes:
        chosen: For each decode tensor parallel rank the prefill ranks (of a stage) that it may read
            from, where a host has chosen among replicas by itself; None: the plan chooses.
    """

    prefill: Side
    decode: Side
    chosen: tuple[tuple[int, ...], ...] | None = field(default=None)

    @property
    def ratio(self) -> str:
        """For messages: "prefill TP 8 -> decode TP 3"."""
        return f"{_parallel('prefill', self.prefill)} -> {_parallel('decode', self.decode)}"

    @property
    def shared(self) -> tuple[LayerGroup, ...]:
        """Groups that are moved: all of decode's; a draft model of prefill alone is left."""
        return self.decode.groups


def _parallel(name: str, side: Side) -> str:
    return f"{name} TP {side.tp}" + (f" PP {side.pp}" if side.pp > 1 else "")

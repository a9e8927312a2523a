"""A prefill and a decode instance in numpy: their memory, what belongs in it, and what arrives.

Written without the plan's own arithmetic: which heads, layers and bytes a rank holds is computed
from vLLM's rules, from one tensor [layers, tokens, heads, width] for each part of each group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ascend_patch.kernels import kv_layout

POISON = 0xA5


@dataclass
class Memory:
    """All ranks' caches of one side in one array, with gaps between regions and between blocks."""

    side: kv_layout.Side
    num_blocks: int
    bytes: np.ndarray
    bases: dict[int, list[int]]
    strides: dict[int, list[int]]
    views: dict[int, list[tuple[str, int, int, np.ndarray]]]  # (group, layer, part, [blocks, ...])


def even_split(layers: int, stages: int) -> list[int]:
    """vLLM's get_pp_indices, as its documentation has it: the rest to the middle, not the last."""
    sizes = [layers // stages] * stages
    for extra in range(layers % stages):
        sizes[stages - 2 - extra] += 1
    return sizes


def heads_of(kv_heads: int, tp: int, rank: int) -> range:
    """The heads of a rank: replicated where there are more ranks than heads."""
    if tp >= kv_heads:
        return range(rank * kv_heads // tp, rank * kv_heads // tp + 1)
    return range(rank * (kv_heads // tp), (rank + 1) * (kv_heads // tp))


def layers_of(side: kv_layout.Side, stage: int) -> list[tuple[kv_layout.LayerGroup, int]]:
    """(group, layer of the group) of a stage, in the order of its regions."""
    model = [(g, n) for g in side.groups if not g.draft for n in range(g.layers)]
    sizes = list(side.stages) or even_split(len(model), side.pp)
    found = model[sum(sizes[:stage]) : sum(sizes[: stage + 1])]
    if stage == side.pp - 1:
        found += [(g, n) for g in side.groups if g.draft for n in range(g.layers)]
    return found


def memory(side: kv_layout.Side, num_blocks: int, rng: np.random.Generator) -> Memory:
    """Poisoned memory, and numpy views of every part of every block."""
    plan, total = [], 64
    for rank in range(side.tp * side.pp):
        for group, layer in layers_of(side, rank // side.tp):
            count = len(heads_of(group.kv_heads, side.tp, rank % side.tp))
            sizes = [side.block_size * count * w * side.itemsize for w in group.widths]
            for parts in [range(len(sizes))] if side.combined else [[p] for p in range(len(sizes))]:
                stride = sum(sizes[p] for p in parts) + int(rng.choice([0, 0, 16, 40]))
                plan.append((rank, group, layer, parts, total, stride, count))
                total += stride * num_blocks + int(rng.integers(0, 3)) * 8
    data = np.full(total, POISON, np.uint8)
    made = Memory(side, num_blocks, data, {}, {}, {})
    for rank, group, layer, parts, base, stride, count in plan:
        made.bases.setdefault(rank, []).append(base)
        made.strides.setdefault(rank, []).append(stride)
        blocks = data[base : base + num_blocks * stride].reshape(num_blocks, stride)
        offset = 0
        for part in parts:
            row = group.widths[part] * side.itemsize
            size = side.block_size * count * row
            block = blocks[:, offset : offset + size]
            strides = (stride, count * row, row, 1)
            shape = (num_blocks, side.block_size, count, row)
            if side.layout == kv_layout.HND:
                strides = (stride, row, side.block_size * row, 1)
            view = np.lib.stride_tricks.as_strided(block, shape, strides)
            made.views.setdefault(rank, []).append((group.name, layer, part, view))
            offset += size
    return made


class World:
    """A request of ``tokens`` tokens, of which decode has ``cached`` blocks."""

    def __init__(self, topology: kv_layout.Topology, tokens: int, cached: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.topology, self.tokens, self.cached = topology, tokens, cached
        self.rounds = 0
        prefill, decode = topology.prefill, topology.decode
        self.counts = [-(-tokens // side.block_size) for side in (prefill, decode)]
        extra = rng.integers(0, 4, 2)
        sizes = [int(n + 1 + e) for n, e in zip(self.counts, extra, strict=True)]
        self.blocks = [
            rng.permutation(size)[:count].tolist()
            for size, count in zip(sizes, self.counts, strict=True)
        ]
        self.prefill = memory(prefill, sizes[0], rng)
        self.decode = memory(decode, sizes[1], rng)
        room = 2 * max(prefill.block_size, decode.block_size) + tokens
        self.truth = {
            (g.name, part): rng.integers(
                0, 256, (g.layers, room, g.kv_heads, w * prefill.itemsize), np.uint8
            )
            for g in {g.name: g for g in (*prefill.groups, *decode.groups)}.values()
            for part, w in enumerate(g.widths)
        }
        self.fill(self.prefill, self.blocks[0], 0, self.counts[0] * prefill.block_size)

    def fill(self, target: Memory, blocks: list[int], first: int, end: int) -> int:
        """Write what a side computes itself for tokens ``first`` to ``end - 1``: bytes written."""
        written = 0
        size = target.side.block_size
        tokens = np.arange(first, end)
        at = np.asarray(blocks, np.int64)[tokens // size]
        for rank, views in target.views.items():
            for group, layer, part, view in views:
                found = next(g for g in target.side.groups if g.name == group)
                heads = heads_of(found.kv_heads, target.side.tp, rank % target.side.tp)
                values = self.truth[group, part][layer][tokens][:, list(heads)]
                view[at, tokens % size] = values
                written += values.size
        return written

    def move(self, plan: kv_layout.Plan, buffer: int = 0) -> np.ndarray:
        """Do what a plan says, merges included; how often each byte of decode was written.

        With a ``buffer`` of so many bytes, heads of tokens go through it.
        """
        decode, prefill = self.decode, self.prefill
        count = np.zeros(len(decode.bytes), np.int64)
        pairs = kv_layout.match_blocks(
            plan.topology,
            self.blocks[0],
            self.blocks[1][self.cached :],
            tokens=self.tokens,
        )
        for transfer in plan.transfers:
            ranks = transfer.prefill_rank, transfer.decode_rank
            places = {
                "prefill_bases": prefill.bases[ranks[0]],
                "decode_bases": decode.bases[ranks[1]],
                "prefill_strides": prefill.strides[ranks[0]],
                "decode_strides": decode.strides[ranks[1]],
            }
            limits = {
                "prefill_num_blocks": prefill.num_blocks,
                "decode_num_blocks": decode.num_blocks,
            }
            found = kv_layout.descriptors(
                plan, *ranks, pairs, **places, **limits, staged=buffer > 0
            )
            self.transfer(found, prefill.bytes, decode.bytes, count)
            if buffer:
                self.stage(plan, ranks, pairs, places, buffer, count)
        for rank in decode.views:
            for merge in plan.merges(rank):
                self.merge(rank, merge)
        return count

    def transfer(
        self,
        found: kv_layout.Descriptors,
        source_bytes: np.ndarray,
        target_bytes: np.ndarray,
        count: np.ndarray,
    ) -> None:
        """What the engine does: the side that acts is local."""
        local, remote, lengths = (np.asarray(x, np.int64) for x in found.lists())
        pull = found.direction == kv_layout.PULL
        source, place = (remote, local) if pull else (local, remote)
        for length in np.unique(lengths):
            which = lengths == length
            reach = np.arange(length)
            into = (place[which][:, None] + reach).ravel()
            target_bytes[into] = source_bytes[(source[which][:, None] + reach).ravel()]
            np.add.at(count, into, 1)

    def stage(self, plan, ranks, pairs, places, size: int, count: np.ndarray) -> None:
        """The rounds through a buffer, poisoned before each."""
        pull = plan.direction == kv_layout.PULL
        acting, rank = (self.decode, ranks[1]) if pull else (self.prefill, ranks[0])
        whole = torch.from_numpy(acting.bytes)
        caches = [whole[base:] for base in acting.bases[rank]]
        buffer, base = np.empty(size, np.uint8), 4096
        rounds = kv_layout.staged_rounds(
            plan, *ranks, pairs, **places, staging_base=base, staging_bytes=size
        )
        for one in rounds:
            buffer[:] = 0x5A
            shifted = replace(
                one.ranges,
                prefill=one.ranges.prefill - (0 if pull else base),
                decode=one.ranges.decode - (base if pull else 0),
            )
            if pull:
                written = np.zeros(size, np.int64)
                self.transfer(shifted, self.prefill.bytes, buffer, written)
                assert written.max() == 1
                for part in one.copies:
                    at = self.places_of(part, acting.bases[rank])
                    np.add.at(count, at, 1)
                kv_layout.copy_staged(one, caches, torch.from_numpy(buffer))
            else:
                kv_layout.copy_staged(one, caches, torch.from_numpy(buffer))
                self.transfer(shifted, buffer, self.decode.bytes, count)
            self.rounds += 1

    @staticmethod
    def places_of(part, bases: list[int]) -> np.ndarray:
        """The addresses of decode that a copy from the buffer writes."""
        starts = bases[part.region] + part.offset + part.blocks * part.steps[0]
        starts = starts + part.units * part.steps[1]
        ranges = np.arange(part.count) * part.steps[2]
        return (starts[:, None, None] + ranges[:, None] + np.arange(part.length)).ravel()

    def merge(self, rank: int, merge: kv_layout.Merge) -> None:
        """merge_head_shards_ on a rank's memory, as bytes."""
        side, whole = self.decode.side, torch.from_numpy(self.decode.bytes)
        caches, heads = [], sum(merge.shards)
        for number, region in enumerate(merge.regions):
            base, stride = self.decode.bases[rank][region], self.decode.strides[rank][region]
            parts = range(len(merge.widths))
            for part in parts if side.combined else [number % len(merge.widths)]:
                row = merge.widths[part] * side.itemsize
                shape = (self.decode.num_blocks, side.block_size, heads, row)
                caches.append(whole.as_strided(shape, (stride, heads * row, row, 1), base))
                base += side.block_size * heads * row
        kv_layout.merge_head_shards_(caches, self.blocks[1][self.cached :], merge.shards)

    def wanted(self) -> tuple[np.ndarray, int]:
        """What decode's memory must be afterwards, and how many bytes of it are moved."""
        before = self.decode.bytes.copy()
        self.decode.bytes[:] = POISON
        sizes = self.topology.prefill.block_size, self.topology.decode.block_size
        end = min(-(-self.tokens // min(sizes)) * min(sizes), self.counts[1] * sizes[1])
        written = self.fill(self.decode, self.blocks[1], self.cached * sizes[1], end)
        expected = self.decode.bytes.copy()
        self.decode.bytes[:] = before
        return expected, written


def fault(
    topology: kv_layout.Topology,
    plan: kv_layout.Plan,
    tokens: int,
    cached: int,
    seed: int,
    buffer: int = 0,
) -> str | None:
    """What is wrong with decode's memory after a plan was carried out, or None."""
    world = World(topology, tokens, cached, seed)
    expected, moved = world.wanted()
    count = world.move(plan, buffer)
    if count.max() > 1:
        return f"{(count > 1).sum()} bytes were written more than once"
    if count.sum() != moved:
        return f"{count.sum()} bytes were written, and decode needs {moved}"
    wrong = int((world.decode.bytes != expected).sum())
    return f"{wrong} bytes are wrong" if wrong else None

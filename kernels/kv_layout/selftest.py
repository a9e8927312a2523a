"""merge_head_shards_, to be tried on the machine that it is to run on: bytes, so right or wrong.

The oracle is a loop over shards on the CPU that shares nothing with the kernel's permutation. What
is not offered by default is offered here: on an NPU, the Triton kernel, which has run on none
before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.kv_layout import cases, merge, merge_triton
from ascend_patch.kernels.selftest import Suite, Verdict, fault

PATCH = "kv_connector"


@dataclass(frozen=True)
class MergeTrial:
    """One merge; ``staging`` as merge_head_shards_ has it."""

    case: cases.MergeCase
    caches: list[Tensor]
    block_ids: list[int]
    staging: list[Tensor] | None

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""
        parts, sources = self._parts(self.caches), self._parts(self.staging or self.caches)
        if self.staging is None:
            sources = parts
        call = merge.MergeCall(parts, sources, tuple(self.block_ids), self.case.shards)
        found = dispatch.candidates(merge.OPERATOR, self.caches[0].device.type)
        return [i for i in found if i.supports(call)[0]]

    def judged(self) -> Verdict:
        """Every byte of every cache is what it must be, blocks that were not named included."""
        before = [x.to("cpu", copy=True) for x in self.caches]
        sources = before if self.staging is None else [x.cpu() for x in self.staging]
        dim = 1 if self.case.combined else None
        merge.merge_head_shards_(
            self.caches, self.block_ids, self.case.shards, parts_dim=dim, staging=self.staging
        )
        for number, cache in enumerate(self.caches):
            want = before[number].clone()
            for i, block in enumerate(self.block_ids):
                place = block if self.staging is None else i
                want[block] = _one_block(sources[number][place], self.case)
            wrong = int((_bytes(cache.cpu()) != _bytes(want)).sum())
            if wrong:
                return fault(f"cache {number}: {wrong} bytes are not where they belong")
        return Verdict()

    def _parts(self, caches: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.case.combined:
            return tuple(caches)
        return tuple(part for cache in caches for part in cache.unbind(1))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _one_block(block: Tensor, case: cases.MergeCase) -> Tensor:
    """[(2,) block_size, H, W] from its shards, a head at a time."""
    out = torch.empty_like(block)
    for part, into in zip(_each(block, case), _each(out, case), strict=True):
        flat, start, first = part.flatten(), 0, 0
        for heads in case.shards:
            size = case.block_size * heads * case.width
            shard = flat[start : start + size].view(case.block_size, heads, case.width)
            for head in range(heads):
                into[:, first + head] = shard[:, head]
            start, first = start + size, first + heads
    return out


def _each(block: Tensor, case: cases.MergeCase) -> list[Tensor]:
    return list(block.unbind(0)) if case.combined else [block]


def _cases(every: bool) -> list[cases.MergeCase]:
    return [*cases.CASES, *cases.UNEVEN] if every else list(cases.CASES[:6])


def _trial(case: cases.MergeCase, seed: int, device: str) -> MergeTrial:
    caches, ids, staging = cases.make_inputs(case, seed, device)
    return MergeTrial(case, caches, ids, staging)


def _offer(device: str) -> None:
    if device == "npu":
        merge_triton.register_on_npu()


SUITES = (Suite(merge.OPERATOR, PATCH, _cases, _trial, _offer),)

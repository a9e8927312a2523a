"""Merges that tests, the offline compilers and the benchmark share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeCase:
    """``layers`` layers of K and V, a request of ``blocks`` blocks.

    Attributes:
        staging: The shards lie in buffers of their own.
        combined: K and V are in one tensor [num_blocks, 2, block_size, H, W].
        gap: Elements between one block and the next.
    """

    shards: tuple[int, ...]
    blocks: int = 5
    block_size: int = 128
    width: int = 128
    dtype: str = "bfloat16"
    layers: int = 2
    staging: bool = False
    combined: bool = False
    gap: int = 0

    @property
    def heads(self) -> int:
        """Of a block."""
        return sum(self.shards)

    @property
    def total_bytes(self) -> int:
        """Of all blocks of the request: what is read at least, and written as much."""
        item: int = getattr(torch, self.dtype).itemsize
        block = self.block_size * self.heads * self.width * item
        return 2 * self.layers * self.blocks * block

    def __str__(self) -> str:
        marks = [f"gap{self.gap}"] if self.gap else []
        marks += [name for name in ("staging", "combined") if getattr(self, name)]
        name = f"{'+'.join(map(str, self.shards))} heads x{self.width} b{self.block_size}"
        return " ".join((name, self.dtype, *marks))


# Two to eight ranks to one, both ways of holding K and V; sizes that are no powers of two.
CASES = (
    MergeCase((1, 1)),
    MergeCase((4, 4)),
    MergeCase((2, 2, 2, 2)),
    MergeCase((1,) * 8),
    MergeCase((1,) * 16, block_size=16, width=64),
    MergeCase((4, 4), staging=True),
    MergeCase((1,) * 8, staging=True, combined=True),
    MergeCase((2, 2), combined=True, gap=32),
    MergeCase((1, 1), dtype="float32", width=64, block_size=32),
    MergeCase((1, 1), dtype="int8", width=576, block_size=16),
    MergeCase((2, 2), width=80, block_size=64),
)
UNEVEN = (
    MergeCase((2, 1)),
    MergeCase((1, 2, 3), block_size=48, width=96),
    MergeCase((1, 1, 1), block_size=128, staging=True),
    MergeCase((3, 3), block_size=20, width=5, dtype="int8", gap=3),
    MergeCase((1, 1), block_size=1, width=3, dtype="float16", combined=True),
)


def make_inputs(
    case: MergeCase, seed: int, device: str = "cpu", num_blocks: int | None = None
) -> tuple[list[Tensor], list[int], list[Tensor] | None]:
    """(caches, block_ids, staging): random bits, blocks in random order, NaN among the values."""
    # Other devices' generators draw no bytes; and what is drawn there would be another case.
    drawn_on = "cuda" if device.startswith("cuda") else "cpu"
    generator = torch.Generator(drawn_on).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    total = case.blocks + 3 if num_blocks is None else num_blocks

    def cache(blocks: int) -> Tensor:
        parts = (2,) if case.combined else ()
        inner = 2 if case.combined else 1
        block = case.block_size * case.heads * case.width
        step = inner * block + case.gap
        size = (blocks * step, dtype.itemsize)
        bits = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=drawn_on)
        flat = bits.to(device).view(dtype).view(-1)
        shape = (blocks, *parts, case.block_size, case.heads, case.width)
        rows = (case.heads * case.width, case.width, 1)
        return flat.as_strided(shape, (step, *((block,) if parts else ()), *rows))

    count = case.layers * (1 if case.combined else 2)
    caches = [cache(total) for _ in range(count)]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    ids = order[: case.blocks].tolist()
    return caches, ids, [cache(case.blocks) for _ in range(count)] if case.staging else None

"""The calls of apply_rotary that tests share; plain data, as in cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ascend_patch.kernels.rope.cases import DTYPES, STYLES

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class AnglesCase:
    """One call; ``batch`` None: no such dimension. ``from_qkv``: a slice of [b, s, 3, h, d]."""

    places: int
    heads: int
    head_size: int
    rotary_dim: int
    batch: int | None = None
    per_entry: bool = False
    is_neox_style: bool = True
    dtype: str = "bfloat16"
    angles_dtype: str = "float32"
    from_qkv: bool = False

    def __str__(self) -> str:
        """A readable test id."""
        return "-".join(
            (
                "neox" if self.is_neox_style else "gptj",
                self.dtype,
                f"D{self.head_size}r{self.rotary_dim}",
                f"H{self.heads}",
                f"b{self.batch}s{self.places}",
                f"{'per-entry' if self.per_entry else 'shared'}-{self.angles_dtype}",
                "qkv" if self.from_qkv else "contiguous",
            )
        )


# (head_size, rotary_dim): 80 and 72 are Qwen2-VL's and Qwen3-VL's vision towers.
HEADS = ((80, 80), (72, 72), (64, 64), (128, 128), (128, 96), (96, 32), (192, 192), (256, 64))
LAYOUTS = ((None, False), (1, False), (2, False), (3, True))


def angles_cases() -> list[AnglesCase]:
    """Style x dtype x head size in full; batch, places, heads and strides take turns."""
    turns = [*product(LAYOUTS, (0, 1, 7, 129), (1, 12, 16, 64), (False, True))]
    found = []
    for n, (style, dtype, (head_size, rotary_dim)) in enumerate(product(STYLES, DTYPES, HEADS)):
        (batch, per_entry), places, heads, from_qkv = turns[n * 37 % len(turns)]
        found.append(
            AnglesCase(
                places=places,
                heads=heads,
                head_size=head_size,
                rotary_dim=rotary_dim,
                batch=batch,
                per_entry=per_entry,
                is_neox_style=style,
                dtype=dtype,
                angles_dtype=("float32", dtype, "bfloat16")[n % 3],
                from_qkv=from_qkv,
            )
        )
    # The shape of the change that this operator began with: q and k of one image in one call.
    found.append(AnglesCase(1024, 16, 80, 80, batch=2))
    return found


def make_angles_inputs(
    case: AnglesCase, seed: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, cos, sin) of a case, the same for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    batch = () if case.batch is None else (case.batch,)
    parts = (3,) if case.from_qkv else ()
    shape = (*batch, case.places, *parts, case.heads, case.head_size)
    x = torch.randn(shape, generator=generator).to(device, getattr(torch, case.dtype))
    if case.from_qkv:
        x = x.select(-3, 1)
    entries = batch if case.per_entry else ()
    angles = torch.randn(*entries, case.places, case.rotary_dim // 2, generator=generator) * 3
    dtype = getattr(torch, case.angles_dtype)
    return x, angles.cos().to(device, dtype), angles.sin().to(device, dtype)

"""The calls of split_qkv_rmsnorm_rope that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ascend_patch.kernels.rope import cases

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class FusedCase:
    """``rope`` says what rotates; the rest is the norm's."""

    rope: cases.RopeCase
    weight_offset: float = 0.0
    has_gate: bool = False
    has_bias: bool = False
    weight_dtype: str = "bfloat16"
    eps: float = 1e-6

    def __str__(self) -> str:
        extras = ("gate", self.has_gate), ("bias", self.has_bias), ("1+w", self.weight_offset)
        return "-".join([str(self.rope), *(name for name, there in extras if there)])

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call, but for the biases."""
        return {
            **self.rope.options,
            "num_q_heads": self.rope.query_heads,
            "num_kv_heads": self.rope.key_heads,
            "eps": self.eps,
            "weight_offset": self.weight_offset,
            "has_gate": self.has_gate,
        }


def fused_cases() -> list[FusedCase]:
    """The grid's heads, styles and dtypes, each with another gate, bias and offset; then MRoPE."""
    grid = [c for c in cases.correctness_cases()[::3] if c.key_heads] + cases.mrope_cases()[::5]
    found = []
    for n, case in enumerate(grid):
        case = replace(case, key_heads=case.key_heads or 2)
        found.append(
            FusedCase(
                case,
                weight_offset=float(n % 3 == 1),
                has_gate=n % 4 == 2,
                has_bias=n % 5 == 3,
                weight_dtype=("bfloat16", "float32", "float16")[n % 3],
                eps=(1e-6, 1e-5)[n % 2],
            )
        )
    # Where a racy read of positions would show: many tokens, 64 heads and 4.
    found.append(FusedCase(cases.RopeCase(300, 64, 4, 128, 128, max_position=4096)))
    return found


def upstream_cases() -> list[FusedCase]:
    """The shapes of the tests that vllm-ascend's fused kernel came with; tokens take turns."""
    counts = ((12, 1), (16, 1), (32, 4), (64, 4))
    found = [
        FusedCase(
            cases.RopeCase((1, 4, 8, 16, 1024)[(n + bias) % 5], *heads, 128, 128), has_bias=bias
        )
        for n, heads in enumerate(counts)
        for bias in (False, True)
    ]
    partial = cases.RopeCase(16, 12, 1, 128, 64)
    by_axis = cases.RopeCase(16, 12, 1, 256, 192, mrope_section=(32, 32, 32))
    return [*found, FusedCase(partial), FusedCase(by_axis)]


def make_fused_inputs(
    case: FusedCase, seed: int, device: str | torch.device = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """((qkv, positions, cos_sin_cache, q_weight, k_weight), biases) of a case."""
    import torch

    rope = case.rope
    positions, _, _, cache = cases.make_inputs(rope, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    heads = rope.query_heads * (2 if case.has_gate else 1) + 2 * (rope.key_heads or 0)
    qkv = torch.randn(rope.tokens, heads * rope.head_size, generator=generator) * 3
    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    dtype = getattr(torch, case.weight_dtype)
    vectors = {
        name: torch.randn(rope.head_size, generator=generator).to(device, dtype) for name in names
    }
    qkv = qkv.to(device, getattr(torch, rope.dtype))
    biases = {name: vectors[name] for name in names[2:]} if case.has_bias else {}
    weights = vectors["q_weight"], vectors["k_weight"]
    return (qkv, positions.to(device), cache.to(device), *weights), biases

"""Long prefills: every element is checked to be written, some tokens to be right."""

from __future__ import annotations

import random
from dataclasses import replace

import fused_judge
import rope_oracle_torch as oracle_torch
import torch

from ascend_patch.kernels import rope
from ascend_patch.kernels.rope import cases, fused_cases

LONG = 512


def some_tokens(tokens: int, seed: int) -> torch.Tensor:
    """The first, the last and fifty between."""
    drawn = random.Random(seed).sample(range(tokens), 50)
    return torch.tensor(sorted({0, tokens - 1, *drawn}))


def rotary(case: cases.RopeCase, seed: int, device: str = "cpu") -> None:
    call = positions, query, key, cache = cases.make_inputs(case, seed, device)
    got = rope.rotary_embedding(*call, **case.options)
    part = some_tokens(case.tokens, seed).to(device)
    phase = oracle_torch.phases(
        positions[..., part], cache, case.mrope_section, case.mrope_interleaved
    )
    for result, x in zip(got, (query, key), strict=True):
        assert result.isfinite().all()
        few = (result[part], x[part], phase, case.head_size, case.is_neox_style)
        oracle_torch.judge(*few)


def fused(case: fused_cases.FusedCase, seed: int, device: str = "cpu") -> None:
    call, biases = fused_cases.make_fused_inputs(case, seed, device)
    got = rope.split_qkv_rmsnorm_rope(*call, **biases, **case.options)
    part = some_tokens(case.rope.tokens, seed).to(device)
    few = (call[0][part], call[1][..., part], *call[2:])
    shorter = replace(case, rope=replace(case.rope, tokens=len(part)))
    for result, want in zip(got, fused_judge.expected(shorter, few, biases), strict=True):
        assert result.isfinite().all()
        fused_judge.assert_close(result[part], want)

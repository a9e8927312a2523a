"""One call of split_qkv_rmsnorm_rope, judged in fp64 by a formula of its own."""

from __future__ import annotations

import numpy as np
import rope_oracle as oracle
import torch

from ascend_patch.kernels import rope
from ascend_patch.kernels.rope import fused_cases


def flat_heads(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.reshape(x.shape[0], x.shape[1] * x.shape[2]))


def expected(case: fused_cases.FusedCase, call, biases) -> list[oracle.Expected]:
    """What q, k, v and gate must be, each [T, heads * head_size]."""
    qkv, positions, cache, q_weight, k_weight = call
    shape, size = case.rope, case.rope.head_size
    tokens, q_heads, k_heads = shape.tokens, shape.query_heads, shape.key_heads or 0
    heads = qkv.detach().double().cpu().numpy().reshape(tokens, qkv.shape[1] // size, size)
    step = 2 if case.has_gate else 1
    q = heads[:, : step * q_heads : step]
    k, v = (heads[:, step * q_heads + n * k_heads :][:, :k_heads] for n in (0, 1))
    phase = oracle.phases(positions, cache, shape.mrope_section, shape.mrope_interleaved)
    found = []
    for x, weight, name in ((q, q_weight, "q_bias"), (k, k_weight, "k_bias")):
        norm = np.sqrt((x**2).mean(axis=-1, keepdims=True) + case.eps)
        x = x / norm * (weight.double().cpu().numpy() + case.weight_offset)
        bias = biases[name].double().cpu().numpy() if biases else 0.0
        flat = flat_heads(x + bias)
        value, _ = oracle.rotate(flat, phase, size, shape.is_neox_style)
        # A sum of squares, a root and three products come before the rotation: 4 epsilons become
        # 12, of what is added up rather than of the sum.
        raw = flat_heads(np.abs(x) + np.abs(bias))
        _, weight_of_pair = oracle.rotate(raw, phase, size, shape.is_neox_style)
        weight_of_pair = np.maximum(weight_of_pair, raw.numpy())
        found.append(oracle.Expected(value, 3 * weight_of_pair))
    copies = [v, heads[:, 1 : 2 * q_heads : 2]] if case.has_gate else [v]
    exact = (flat_heads(x).numpy() for x in copies)
    return found + [oracle.Expected(x, np.zeros_like(x)) for x in exact]


def assert_close(result: torch.Tensor, want: oracle.Expected) -> None:
    """In fp32 a dozen roundings come before the last: no share of them is held to one ulp."""
    oracle.assert_close(result, want, share=result.dtype != torch.float32)


def run_and_judge(case: fused_cases.FusedCase, seed: int, device: str = "cpu") -> None:
    call, biases = fused_cases.make_fused_inputs(case, seed, device)
    before = call[0].clone()
    got = rope.split_qkv_rmsnorm_rope(*call, **biases, **case.options)
    assert torch.equal(call[0], before), "qkv changed"
    want = expected(case, call, biases)
    assert len(got) == len(want) == (4 if case.has_gate else 3)
    for n, (result, judge) in enumerate(zip(got, want, strict=True)):
        assert result.is_contiguous()
        assert result.dtype == call[0].dtype
        assert_close(result, judge)
        if n >= 2:
            assert np.array_equal(result.double().cpu().numpy(), judge.value), "a copy differs"

"""The gates of a gated delta rule layer in fp64, and random ones to try."""

from __future__ import annotations

import numpy as np
import torch


def make_gates(tokens: int, heads: int, dtype: str, seed: int, device: str = "cpu") -> dict:
    """a and b are slices of one tensor, as a model's projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    # Wide enough to meet both ends: softplus a line, sigmoid at 0 and 1.
    both = 12 * torch.randn(tokens, 2 * heads + 3, generator=generator)
    a, b = both.to(getattr(torch, dtype)).to(device)[:, : 2 * heads].split(heads, 1)
    A_log, dt_bias = torch.randn(2, heads, generator=generator).to(device)
    return {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias.to(a.dtype)}


def gates_in_fp64(
    a, b, A_log, dt_bias, softplus_beta: float = 1.0, softplus_threshold: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """g and beta, [T, HV]."""
    a, b, A_log, dt_bias = (x.double().cpu().numpy() for x in (a, b, A_log, dt_bias))
    x = softplus_beta * (a + dt_bias)
    steps = np.where(x > softplus_threshold, x, np.logaddexp(0.0, x)) / softplus_beta
    return -np.exp(A_log) * steps, 1.0 / (1.0 + np.exp(-b))


def worst(found, wanted) -> float:
    """The largest error, relative where a number is above 1."""
    errors = [0.0]
    for got, want in zip(found, wanted, strict=True):
        got = got[0].double().cpu().numpy()
        errors.append(float((np.abs(got - want) / np.maximum(np.abs(want), 1.0)).max(initial=0.0)))
    return max(errors)

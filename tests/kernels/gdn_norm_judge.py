"""gated_rms_norm against its formula in fp64 with numpy, on random calls."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from ascend_patch.kernels import gdn

FP32 = 2.0**-23
EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    """Rows of the last axis of ``shape``. ``sliced``: x and gate are parts of wider rows."""

    shape: tuple[int, ...]
    group: int | None = None
    dtype: str = "float32"
    weight_dtype: str = ""
    gate: bool = True
    before: bool = True
    sliced: bool = False
    given: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:]]
        usual = [f"{f.name}={f.default}" for f in fields(self)[1:]]
        shape = "x".join(map(str, self.shape))
        return " ".join([shape, *(x for x in shown if x not in usual)])


def make_norm(case: NormCase, seed: int, device: str = "cpu") -> dict:
    """The arguments of a call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: str = "") -> torch.Tensor:
        found = torch.randn(*shape, generator=generator)
        return found.to(getattr(torch, dtype or case.dtype)).to(device)

    def rows() -> torch.Tensor:
        if not case.sliced:
            return normal(*case.shape)
        # As a model's: heads are parts of a token's row, which has more behind them.
        *outer, heads, size = case.shape
        wide = normal(*outer, heads * size + 5)
        return wide[..., : heads * size].unflatten(-1, (heads, size))

    given = {"x": rows() * case.scale, "gate": rows() if case.gate else None}
    if case.sliced:
        given["x"] = rows().mul_(case.scale)
    given["weight"] = normal(case.shape[-1], dtype=case.weight_dtype)
    given |= {"eps": EPS, "group_size": case.group, "norm_before_gate": case.before}
    if case.given:
        given["out"] = torch.full_like(
            given["x"], float("nan"), memory_format=torch.contiguous_format
        )
    return given


def judge_norm(case: NormCase, seed: int, device: str = "cpu", run=None, cut: int = 1) -> float:
    """The largest error as a share of what rounding once allows; asserts everything else."""
    given = make_norm(case, seed, device)
    kept = {
        name: given[name].clone() for name in ("x", "gate", "weight") if given[name] is not None
    }
    out = (run or gdn.gated_rms_norm)(**given)
    for name, before in kept.items():
        assert torch.equal(given[name], before), f"{name} was written to"
    assert not case.given or out is given["out"]
    assert out.dtype == given["x"].dtype
    wanted, factor = formula(case, kept)
    if not wanted.size:
        assert out.shape == given["x"].shape
        return 0.0
    found = out.double().cpu().numpy()
    info = torch.finfo(out.dtype)
    allowed = cut * info.eps / 2 * 1.01 * np.abs(wanted) + info.smallest_normal * info.eps
    # The mean, its root, the exponential and four products in float32; of gates far below zero the
    # exponential is what is left.
    allowed += 16 * FP32 * factor
    share = np.abs(found - wanted) / allowed
    assert np.isfinite(share).all(), "not a number"
    return float(share.max())


def formula(case: NormCase, given: dict) -> tuple[np.ndarray, np.ndarray]:
    """What is wanted, and what float32 errs in proportion to."""
    x, weight = (given[name].double().cpu().numpy() for name in ("x", "weight"))
    silu = 1.0
    if case.gate:
        gate = given["gate"].double().cpu().numpy()
        silu = gate / (1 + np.exp(-gate))
    if not case.before:
        x = x * silu
    group = case.group or x.shape[-1]
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    size = np.sqrt((groups**2).mean(-1, keepdims=True) + EPS)
    wanted = (groups / size).reshape(x.shape) * weight
    if case.before:
        wanted = wanted * silu
    return wanted, np.abs(wanted)

"""One call of apply_rotary, judged by the fp64 oracle; for every device and interpreter."""

from __future__ import annotations

import rope_oracle as oracle
import torch

from ascend_patch.kernels import rope
from ascend_patch.kernels.rope import angles_cases


def expected(case: angles_cases.AnglesCase, call) -> oracle.Expected:
    """Of each batch entry one after another: [batch * places, heads, head_size]."""
    x, cos, sin = (t.detach().cpu() for t in call)
    batch = case.batch or 1
    phase = (cos.double() + 1j * sin.double()).numpy()
    half = case.rotary_dim // 2
    phase = phase.reshape(batch if case.per_entry else 1, case.places, half)
    phase = phase.repeat(1 if case.per_entry else batch, axis=0)
    flat = x.reshape(batch * case.places, case.heads, case.head_size)
    phase = phase.reshape(batch * case.places, half)
    return oracle.rotate(flat, phase, case.head_size, case.is_neox_style)


def judge(case: angles_cases.AnglesCase, got: torch.Tensor, call) -> None:
    """Raise AssertionError if ``got`` is not what the call asked for."""
    x = call[0]
    assert got.is_contiguous()
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    want = expected(case, call)
    oracle.assert_close(got.reshape(want.value.shape), want)
    assert torch.equal(got[..., case.rotary_dim :], x[..., case.rotary_dim :]), "the rest changed"


def run_and_judge(case: angles_cases.AnglesCase, seed: int, device: str = "cpu") -> None:
    call = angles_cases.make_angles_inputs(case, seed, device)
    before = call[0].clone()
    got = rope.apply_rotary(*call, is_neox_style=case.is_neox_style)
    assert torch.equal(call[0], before), "x changed"
    judge(case, got, call)

"""The rotary operators, to be tried on the machine that they are to run on.

Trials are judged by ``oracle``. What is not offered by default is offered here: on an NPU, the
Triton kernels and torch_npu's operators, none of which has run on one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch, rope
from ascend_patch.kernels.rope import (
    angles_call,
    angles_cases,
    cases,
    fused_call,
    fused_cases,
    npu_call,
    oracle,
    triton_call,
)
from ascend_patch.kernels.selftest import Suite, Verdict, fault, judge

ROTARY, FUSED, ANGLES = "rotary_embedding", "split_qkv_rmsnorm_rope", "apply_rotary"
# Every n-th case of the grid is a quick look: each style, dtype and head size is among them.
QUICK = 2

_OPTIONS = ("head_size", "is_neox_style", "mrope_section", "mrope_interleaved")
_FUSED_OPTIONS = (
    "num_q_heads",
    "num_kv_heads",
    "head_size",
    "eps",
    "is_neox_style",
    "mrope_section",
    "mrope_interleaved",
    "weight_offset",
)


class RopeTrial(Protocol):
    """One call of an operator of this package."""

    @property
    def operator(self) -> str:
        """As ``dispatch`` knows it."""

    @property
    def device(self) -> str:
        """The device type of its tensors."""

    def candidates(self) -> list[dispatch.Implementation]:
        """The implementations that take the call, the one that serves it first."""

    def judged(self) -> Verdict:
        """Run it: how right is the result?"""

    def warm(self) -> object:
        """Compile what calls like it need."""


def _willing(operator: str, device: str, *call: Any) -> list[dispatch.Implementation]:
    return [i for i in dispatch.candidates(operator, device) if i.supports(*call)[0]]


@dataclass(frozen=True)
class Call:
    """One call of rotary_embedding, in both forms."""

    positions: Tensor
    query: Tensor
    key: Tensor | None
    cos_sin_cache: Tensor
    options: dict[str, Any]
    operator: str = ROTARY

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The tensors, in the order of the API."""
        return self.positions, self.query, self.key, self.cos_sin_cache

    @property
    def device(self) -> str:
        """See ``RopeTrial``."""
        return str(self.query.device.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """See ``RopeTrial``; of the functional form."""
        outs = (None if x is None else torch.empty_like(x) for x in (self.query, self.key))
        options = (self.options.get(name) for name in _OPTIONS)
        return _willing(ROTARY, self.device, *outs, *self.inputs, *options)

    def judged(self) -> Verdict:
        """Hold the functional form to the oracle, and the one in place to the functional one."""
        section = self.options.get("mrope_section")
        turns = bool(self.options.get("mrope_interleaved"))
        phase = oracle.phases(self.positions, self.cos_sin_cache, section, turns)
        verdict = Verdict()
        results = rope.rotary_embedding(*self.inputs, **self.options)
        copies = [None if x is None else _same_place(x) for x in (self.query, self.key)]
        assert copies[0] is not None
        rope.rotary_embedding_(self.positions, copies[0], copies[1], self.inputs[3], **self.options)
        for name, x, got, in_place in zip(
            ("query", "key"), (self.query, self.key), results, copies, strict=True
        ):
            if x is None or got is None or in_place is None:
                continue
            style = self.options["head_size"], self.options["is_neox_style"]
            verdict = verdict.and_also(judge(got, oracle.rotated(x, phase, *style), name))
            if not verdict.wrong and not torch.equal(got, in_place):
                verdict = verdict.and_also(fault(f"{name}: in place differs from functional"))
        return verdict

    def warm(self) -> bool:
        """See ``RopeTrial``."""
        return triton_call.warm(*self.inputs, **self.options)


def _same_place(x: Tensor) -> Tensor:
    """A copy of ``x`` that lies as ``x`` does: a slice of a wider row stays one."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


@dataclass(frozen=True)
class FusedCall:
    """One call of split_qkv_rmsnorm_rope.

    Attributes:
        tensors: qkv, positions, cos_sin_cache, q_weight, k_weight.
        biases: q_bias and k_bias, or nothing.
        options: The keyword arguments, but for the biases.
    """

    tensors: tuple[Tensor, ...]
    biases: dict[str, Tensor]
    options: dict[str, Any]
    operator: str = FUSED

    @property
    def device(self) -> str:
        """See ``RopeTrial``."""
        return str(self.tensors[0].device.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """See ``RopeTrial``."""
        qkv, options = self.tensors[0], self.options
        heads = (options["num_q_heads"], options["num_kv_heads"], options["num_kv_heads"])
        outs = [qkv.new_empty(qkv.shape[0], n * options["head_size"]) for n in heads]
        gate = torch.empty_like(outs[0]) if options["has_gate"] else None
        rest = [self.biases.get(name) for name in ("q_bias", "k_bias")]
        rest += [options[name] for name in _FUSED_OPTIONS]
        return _willing(FUSED, self.device, *outs, gate, *self.tensors, *rest)

    def judged(self) -> Verdict:
        """Run it and hold each result to the oracle."""
        results = rope.split_qkv_rmsnorm_rope(  # type: ignore[misc]
            *self.tensors, **self.biases, **self.options
        )
        verdict = Verdict()
        expected = oracle.fused_expected(self.tensors, self.biases, self.options)
        names = ("query", "key", "value", "gate")[: len(expected)]
        for name, got, want in zip(names, results, expected, strict=True):
            # In float32 a dozen roundings come before the last one, which is not 99.9 % of it.
            last = got.dtype != torch.float32
            verdict = verdict.and_also(judge(got, want, name, share_within_an_ulp=last))
        return verdict

    def warm(self) -> bool:
        """See ``RopeTrial``."""
        return fused_call.warm(*self.tensors, **self.biases, **self.options)  # type: ignore[misc]


@dataclass(frozen=True)
class AnglesCall:
    """One call of apply_rotary."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    is_neox_style: bool
    operator: str = ANGLES

    @property
    def device(self) -> str:
        """See ``RopeTrial``."""
        return str(self.x.device.type)

    def candidates(self) -> list[dispatch.Implementation]:
        """See ``RopeTrial``."""
        call = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device), self.x
        return _willing(ANGLES, self.device, *call, self.cos, self.sin, self.is_neox_style)

    def judged(self) -> Verdict:
        """Run it and hold the result to the oracle."""
        call = self.x, self.cos, self.sin
        got = rope.apply_rotary(*call, is_neox_style=self.is_neox_style)
        return judge(got, oracle.angles_expected(*call, self.is_neox_style))

    def warm(self) -> bool:
        """See ``RopeTrial``."""
        return angles_call.warm(self.x, self.cos, self.sin, is_neox_style=self.is_neox_style)


def offer(device: str) -> list[tuple[str, str]]:
    """Make available what waits for a self-test; (operator, name) of what is there now."""
    if device != "npu":
        return []
    offered = []
    if triton_call.register_on_npu(ROTARY):
        offered.append((ROTARY, triton_call.NAME))
    if fused_call.register_on_npu():
        offered.append((FUSED, triton_call.NAME))
    if angles_call.register_on_npu():
        offered.append((ANGLES, triton_call.NAME))
    offered += [pair for pair in npu_call.IMPLEMENTATIONS if npu_call.admit(*pair)]
    return offered


def _call(case: cases.RopeCase, seed: int, device: str) -> Call:
    return Call(*cases.make_inputs(case, seed, device), case.options)


def _rotary_cases(everything: bool) -> list[cases.RopeCase]:
    grid = cases.correctness_cases() + cases.mrope_cases()
    return grid + cases.large_cases() if everything else grid[::QUICK]


def _fused_cases(everything: bool) -> list[fused_cases.FusedCase]:
    return fused_cases.fused_cases()[:: 1 if everything else QUICK]


def _fused_call(case: fused_cases.FusedCase, seed: int, device: str) -> FusedCall:
    return FusedCall(*fused_cases.make_fused_inputs(case, seed, device), case.options)


def _angles_cases(everything: bool) -> list[angles_cases.AnglesCase]:
    return angles_cases.angles_cases()[:: 1 if everything else QUICK]


def _angles_call(case: angles_cases.AnglesCase, seed: int, device: str) -> AnglesCall:
    return AnglesCall(*angles_cases.make_angles_inputs(case, seed, device), case.is_neox_style)


SUITES = (
    Suite(ROTARY, "rotary", _rotary_cases, _call, offer),
    Suite(FUSED, "rotary", _fused_cases, _fused_call, offer),
    Suite(ANGLES, "rotary", _angles_cases, _angles_call, offer),
)

"""The rotary kernels judged in float64 on the CPU, by a formula of its own.

A pair (a, b) is the complex number a + ib, and its rotation the product with cos + i sin. The
reference, which multiplies and adds real numbers in float32, has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch, rope
from ascend_patch.kernels.rope import cases, fused_call, fused_cases, triton_call
from ascend_patch.kernels.selftest import Expected, Suite, Verdict, fault, judge

ROTARY = "rotary_embedding"
FUSED = "split_qkv_rmsnorm_rope"
# Every n-th case of the grid is a quick look: each style, dtype and head size is among them.
QUICK = 2


def phases(
    positions: Tensor,
    cos_sin_cache: Tensor,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """cos + i sin of each token and frequency: complex128 [T, rotary_dim/2] on the CPU.

    Takes what ``rotary_embedding`` takes. Only the rows of the cache that are asked for are moved.
    """
    half = cos_sin_cache.shape[1] // 2
    rows = positions.reshape(-1) if mrope_section is None else positions
    table = cos_sin_cache.index_select(0, rows.reshape(-1).to(torch.int64))
    table = table.to("cpu", torch.float64).reshape(*rows.shape, 2 * half)
    phase = torch.complex(table[..., :half].contiguous(), table[..., half:].contiguous())
    if mrope_section is None or phase.dim() == 2:
        return phase
    axes = _axis_of_frequency(mrope_section, mrope_interleaved, half)
    return torch.stack([phase[axis, :, j] for j, axis in enumerate(axes)], dim=-1)


def _axis_of_frequency(section: Sequence[int], interleaved: bool, half: int) -> list[int]:
    """Which row of positions each frequency reads, dealt out one by one."""
    if not interleaved:
        return [axis for axis, size in enumerate(section) for _ in range(size)]
    axes = [0] * half
    for axis in (1, 2):
        for turn in range(section[axis]):
            if axis + 3 * turn < half:
                axes[axis + 3 * turn] = axis
    return axes


def rotated(x: Tensor, phase: Tensor, head_size: int, is_neox_style: bool) -> Expected:
    """``x`` [T, H*D] or [T, H, D], of any dtype and device, turned by ``phase``."""
    half = phase.shape[1]
    heads = _heads(x, head_size)
    pair = torch.arange(half, device="cpu")
    a = pair if is_neox_style else 2 * pair
    b = a + half if is_neox_style else a + 1
    turned = torch.complex(heads[..., a], heads[..., b]) * phase.unsqueeze(1)
    value, weight = heads.clone(), torch.zeros_like(heads)
    value[..., a], value[..., b] = turned.real, turned.imag
    weight[..., a] = weight[..., b] = heads[..., a].abs() + heads[..., b].abs()
    return Expected(value.reshape(x.shape), weight.reshape(x.shape))


def _heads(x: Tensor, head_size: int) -> Tensor:
    """[T, H, D] in float64 on the CPU; the heads are counted, as -1 means nothing for T = 0."""
    count = x.shape[1] if x.dim() == 3 else x.shape[1] // head_size
    return x.detach().to("cpu", torch.float64).reshape(x.shape[0], count, head_size)


@dataclass(frozen=True)
class Call:
    """One call of rotary_embedding."""

    positions: Tensor
    query: Tensor
    key: Tensor | None
    cos_sin_cache: Tensor
    options: dict[str, Any]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The tensors, in the order of the API."""
        return self.positions, self.query, self.key, self.cos_sin_cache

    def served(self) -> dispatch.Implementation | None:
        """The implementation that takes the functional form of this call."""
        query, key = (None if x is None else torch.empty_like(x) for x in (self.query, self.key))
        options = [self.options.get(name) for name in _OPTIONS]
        found = dispatch.select(ROTARY, self.query.device.type, query, key, *self.inputs, *options)
        return found.implementation

    def judged(self) -> Verdict:
        """Run both forms; the functional one is held to the oracle, and the other one to it."""
        phase = phases(
            self.positions,
            self.cos_sin_cache,
            self.options.get("mrope_section"),
            bool(self.options.get("mrope_interleaved")),
        )
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
            expected = rotated(x, phase, self.options["head_size"], self.options["is_neox_style"])
            verdict = verdict.and_also(judge(got, expected, name))
            if not verdict.wrong and not torch.equal(got, in_place):
                verdict = verdict.and_also(fault(f"{name}: in place differs from functional"))
        return verdict


_OPTIONS = ("head_size", "is_neox_style", "mrope_section", "mrope_interleaved")


def _same_place(x: Tensor) -> Tensor:
    """A copy of ``x`` that lies as ``x`` does: a slice of a wider row stays one."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _call(case: cases.RopeCase, seed: int, device: str) -> Call:
    return Call(*cases.make_inputs(case, seed, device), case.options)


def _rotary_cases(everything: bool) -> list[cases.RopeCase]:
    grid = cases.correctness_cases() + cases.mrope_cases()
    return grid + cases.large_cases() if everything else grid[::QUICK]


def _fused_cases(everything: bool) -> list[fused_cases.FusedCase]:
    found = fused_cases.fused_cases()
    return found if everything else found[::QUICK]


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

    def served(self) -> dispatch.Implementation | None:
        """The implementation that takes this call."""
        qkv, options = self.tensors[0], self.options
        heads = (options["num_q_heads"], options["num_kv_heads"], options["num_kv_heads"])
        outs = [qkv.new_empty(qkv.shape[0], n * options["head_size"]) for n in heads]
        gate = torch.empty_like(outs[0]) if options["has_gate"] else None
        rest = [self.biases.get(name) for name in ("q_bias", "k_bias")]
        rest += [options[name] for name in _FUSED_OPTIONS]
        found = dispatch.select(FUSED, qkv.device.type, *outs, gate, *self.tensors, *rest)
        return found.implementation

    def judged(self) -> Verdict:
        """Run it and hold each result to the oracle."""
        results = rope.split_qkv_rmsnorm_rope(  # type: ignore[misc]
            *self.tensors, **self.biases, **self.options
        )
        verdict = Verdict()
        expected = fused_expected(self.tensors, self.biases, self.options)
        names = ("query", "key", "value", "gate")[: len(expected)]
        for name, got, want in zip(names, results, expected, strict=True):
            verdict = verdict.and_also(judge(got, want, name))
        return verdict


def _fused_call(case: fused_cases.FusedCase, seed: int, device: str) -> FusedCall:
    return FusedCall(*fused_cases.make_fused_inputs(case, seed, device), case.options)


def fused_expected(
    call: Sequence[Tensor], biases: dict[str, Tensor], options: dict[str, Any]
) -> list[Expected]:
    """What query, key, value and, with ``has_gate``, gate must be, each [T, heads * head_size]."""
    qkv, positions, cos_sin_cache, q_weight, k_weight = call
    size, queries, keys = (options[n] for n in ("head_size", "num_q_heads", "num_kv_heads"))
    wide = _heads(qkv, size)
    step = 2 if options["has_gate"] else 1
    q, k, v = wide.split((step * queries, keys, keys), dim=1)
    sections = options["mrope_section"], options["mrope_interleaved"]
    phase = phases(positions, cos_sin_cache, *sections)
    found = []
    for x, weight, name in ((q[:, ::step], q_weight, "q_bias"), (k, k_weight, "k_bias")):
        scale = weight.to("cpu", torch.float64) + options["weight_offset"]
        norm = torch.sqrt(x.square().mean(dim=-1, keepdim=True) + options["eps"])
        x = x / norm * scale
        bias = torch.zeros(size, dtype=torch.float64, device="cpu")
        bias = biases[name].to("cpu", torch.float64) if name in biases else bias
        value = rotated((x + bias).flatten(1), phase, size, options["is_neox_style"]).value
        # The norm comes before the rotation: 4 epsilons become 12, of what is added up.
        raw = (x.abs() + bias.abs()).flatten(1)
        pairs = rotated(raw, phase, size, options["is_neox_style"]).weight
        found.append(Expected(value, 3 * torch.maximum(pairs, raw)))
    copied = [v, q[:, 1::2]] if options["has_gate"] else [v]
    exact = (x.flatten(1) for x in copied)
    return found + [Expected(x, torch.zeros_like(x)) for x in exact]


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


def offer(device: str) -> None:
    """Make available what waits for a self-test: on an NPU, the Triton kernels."""
    if device == "npu":
        triton_call.register_on_npu(ROTARY)
        fused = fused_call.split_qkv_rmsnorm_rope_into, fused_call.supports
        triton_call.register_on_npu(FUSED, *fused)


SUITES = (
    Suite(ROTARY, "rotary", _rotary_cases, _call, offer),
    Suite(FUSED, "rotary", _fused_cases, _fused_call, offer),
)

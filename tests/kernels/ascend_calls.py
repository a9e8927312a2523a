"""The kernels' cases as launches on an NPU: what is compiled, what it may cost, who judges it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import angles_judge
import fused_judge
import rope_oracle as oracle
import torch

from ascend_patch.kernels.rope import (
    angles_call,
    angles_cases,
    cases,
    fused_call,
    fused_cases,
    tiles,
    triton_call,
)


@dataclass(frozen=True)
class Call:
    """A launch over ``tokens``. ``least``: bytes that must be moved; ``bound``: tiles.py's."""

    kernel: Any
    values: tuple[Any, ...]
    constants: dict[str, Any]
    plan: tiles.Tiles
    heads: tuple[int, int]
    tokens: int
    least: int
    bound: int
    judge: Callable[[], None]

    def grid(self, cores: int) -> tuple[int, int, int]:
        return *tiles.grid(self.plan, self.tokens, *self.heads, cores), 1


@dataclass(frozen=True)
class Entry:
    """A case by name. ``make(tokens, seed)`` is its call; calls of one ``key`` compile alike."""

    operator: str
    name: str
    tokens: int
    key: object
    make: Callable[[int, int], Call]

    @property
    def title(self) -> str:
        return f"{self.operator} {self.name}"


def every_case() -> Iterator[Entry]:
    """All cases of kernels/rope, rotary_embedding's in both forms."""
    groups = (cases.correctness_cases, cases.mrope_cases, cases.large_cases, cases.serving_cases)
    for case in (case for group in (*groups, cases.upstream_cases) for case in group()):
        for in_place in (False, True):
            # Tokens, and how positions are drawn, are no part of what is compiled.
            key = replace(case, tokens=2, positions="sorted", max_position=2, name=""), in_place
            operator = f"rotary_embedding{'_' if in_place else ''}"
            yield Entry(operator, str(case), case.tokens, key, _maker(_rotary, case, in_place))
    for fused in fused_cases.fused_cases() + fused_cases.upstream_cases():
        shape = replace(fused.rope, tokens=2, positions="sorted", max_position=2)
        key = replace(fused, rope=shape)
        make = _maker(_fused, fused)
        yield Entry("split_qkv_rmsnorm_rope", str(fused), fused.rope.tokens, key, make)
    for given in angles_cases.angles_cases():
        tokens = (given.batch or 1) * given.places
        key = replace(given, places=2)
        yield Entry("apply_rotary", str(given), tokens, key, _maker(_angles, given))


def _maker(make: Callable[..., Call], *case: Any) -> Callable[[int, int], Call]:
    return lambda tokens, seed: make(tokens, seed, *case)


def _poisoned(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=x.dtype)


def _rotary(tokens: int, seed: int, case: cases.RopeCase, in_place: bool) -> Call:
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    case = replace(case, tokens=tokens)
    call = positions, query, key, cache = cases.make_inputs(case, seed)
    before = query.clone(), None if key is None else key.clone()
    out = tuple(None if x is None else _poisoned(x, *x.shape) for x in (query, key))
    out = (query, key) if in_place else out
    heads = case.query_heads, case.key_heads or 0
    itemsize, rest = query.element_size(), case.head_size - case.rotary_dim
    plan = tiles.ascend_tiles(*heads, case.head_size, case.rotary_dim, itemsize, case.is_neox_style)
    assert plan is not None
    arguments = triton_call.arguments(tokens, plan, *out, *call, *case.options.values())
    width = case.rotary_dim if in_place else case.head_size
    least = 2 * sum(heads) * width * itemsize + case.rotary_dim * cache.element_size()
    least += (positions.shape[0] if positions.dim() == 2 else 1) * positions.element_size()

    def judge() -> None:
        phase = oracle.phases(positions, cache, case.mrope_section, case.mrope_interleaved)
        for got, x in zip(out, before, strict=True):
            if got is None or x is None:
                continue
            want = oracle.rotate(x, phase, case.head_size, case.is_neox_style)
            oracle.assert_close(got, want)
            split = (tokens, x.shape[1] // case.head_size, case.head_size)
            same = (t.reshape(split)[..., case.rotary_dim :] for t in (got, x))
            assert torch.equal(*same), "elements past rotary_dim changed"

    copies = bool(arguments[1]["COPY_REST"])
    bound = tiles.unified_buffer_bytes(plan, rest, itemsize, case.is_neox_style, copies)
    return Call(rotary_kernel, *arguments, plan, heads, tokens, tokens * least, bound, judge)


def _fused(tokens: int, seed: int, case: fused_cases.FusedCase) -> Call:
    from ascend_patch.kernels.rope.fused_kernel import fused_kernel

    rope = replace(case.rope, tokens=tokens)
    case = replace(case, rope=rope)
    call, biases = fused_cases.make_fused_inputs(case, seed)
    qkv, positions, cache = call[:3]
    heads, size = (rope.query_heads, rope.key_heads or 0), rope.head_size
    q_width, k_width = (n * size for n in heads)
    out = [_poisoned(qkv, tokens, width) for width in (q_width, k_width, k_width)]
    gate = _poisoned(qkv, tokens, q_width) if case.has_gate else None
    itemsize = qkv.element_size()
    plan = tiles.fused_ascend_tiles(*heads, size, rope.rotary_dim, itemsize, rope.is_neox_style)
    assert plan is not None
    options = (rope.mrope_section, rope.mrope_interleaved, case.weight_offset)
    vectors = (biases.get("q_bias"), biases.get("k_bias"))
    whole = (*out, gate, *call, *vectors, *heads, size, case.eps, rope.is_neox_style, *options)
    arguments = fused_call.arguments(tokens, plan, *whole)
    least = 2 * qkv.shape[1] * itemsize + rope.rotary_dim * cache.element_size()
    least += (positions.shape[0] if positions.dim() == 2 else 1) * positions.element_size()
    weights = (2 + len(biases)) * size * call[3].element_size()

    def judge() -> None:
        results = (*out, gate) if gate is not None else out
        for result, want in zip(results, fused_judge.expected(case, call, biases), strict=True):
            fused_judge.assert_close(result, want)

    bound = tiles.fused_unified_buffer_bytes(plan, itemsize, rope.is_neox_style)
    total = tokens * least + min(tokens, 1) * weights
    return Call(fused_kernel, *arguments, plan, heads, tokens, total, bound, judge)


def _angles(tokens: int, seed: int, case: angles_cases.AnglesCase) -> Call:
    from ascend_patch.kernels.rope.angles_kernel import angles_kernel

    batch = case.batch or 1
    case = replace(case, places=-(-tokens // batch))
    x, cos, _ = call = angles_cases.make_angles_inputs(case, seed)
    out = _poisoned(x, *x.shape)
    tokens = batch * case.places
    itemsize, rest = x.element_size(), case.head_size - case.rotary_dim
    plan = tiles.ascend_tiles(
        case.heads, 0, case.head_size, case.rotary_dim, itemsize, case.is_neox_style
    )
    assert plan is not None
    arguments = angles_call.arguments(tokens, plan, out, *call, case.is_neox_style)
    least = 2 * x.numel() * itemsize + 2 * cos.numel() * cos.element_size()
    bound = tiles.unified_buffer_bytes(plan, rest, itemsize, case.is_neox_style, rest > 0)
    heads = case.heads, 0

    def judge() -> None:
        angles_judge.judge(case, out, call)

    return Call(angles_kernel, *arguments, plan, heads, tokens, least, bound, judge)

"""The operator ``ascend_patch::split_qkv_rmsnorm_rope``: functional, with a fake implementation.

Importing this module registers it, once in a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.rope import (
    checks,
    fused_call,
    fused_reference,
    registration,
    triton_call,
)

OPERATOR = fused_call.OPERATOR
QUALIFIED = f"ascend_patch::{OPERATOR}"
_SCHEMA = (
    "(Tensor qkv, Tensor positions, Tensor cos_sin_cache, Tensor q_weight, Tensor k_weight, "
    "Tensor? q_bias, Tensor? k_bias, int num_q_heads, int num_kv_heads, int head_size, float eps, "
    "bool is_neox_style, int[]? mrope_section, bool mrope_interleaved, float weight_offset, "
    "bool has_gate) -> (Tensor, Tensor, Tensor, Tensor)"
)

dispatch.register(
    OPERATOR,
    dispatch.ANY_DEVICE,
    dispatch.Implementation("reference", fused_reference.split_qkv_rmsnorm_rope_into),
)
triton_call.register(OPERATOR, fused_call.split_qkv_rmsnorm_rope_into, fused_call.supports)


def _outputs(
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    eps: float,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
    weight_offset: float,
    has_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the call and allocate: also all that the fake implementation has to do."""
    arguments.check_tensors(
        OPERATOR,
        {
            "qkv": qkv,
            "positions": positions,
            "cos_sin_cache": cos_sin_cache,
            "q_weight": q_weight,
            "k_weight": k_weight,
        },
        {"q_bias": q_bias, "k_bias": k_bias},
    )
    if min(num_q_heads, num_kv_heads, head_size) < 1:
        raise ValueError(
            f"num_q_heads, num_kv_heads and head_size must be at least 1, not {num_q_heads}, "
            f"{num_kv_heads} and {head_size}."
        )
    arguments.check_number("eps", eps, least=0)
    arguments.check_number("weight_offset", weight_offset)
    width = (num_q_heads * (2 if has_gate else 1) + 2 * num_kv_heads) * head_size
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(
            f"qkv must be [T, {width}] for {num_q_heads} query heads"
            f"{' with gates' if has_gate else ''} and {num_kv_heads} key and value heads of "
            f"{head_size}, but it is {list(qkv.shape)}."
        )
    query = qkv[:, : num_q_heads * head_size]
    checks.check_call(positions, query, None, cos_sin_cache, head_size, mrope_section)
    vectors = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (head_size,):
            raise ValueError(f"{name} must be [{head_size}], but it is {list(vector.shape)}.")
        if not vector.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {vector.dtype}.")
    tokens, queries, keys = qkv.shape[0], num_q_heads * head_size, num_kv_heads * head_size
    gate = (tokens, queries) if has_gate else (0,)
    shapes = ((tokens, queries), (tokens, keys), (tokens, keys), gate)
    q, k, v, g = (torch.empty(s, dtype=qkv.dtype, device=qkv.device) for s in shapes)
    return q, k, v, g


def _run(*call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, gate = _outputs(*call)
    *rest, has_gate = call
    arguments = (q, k, v, gate if has_gate else None, *rest)
    choice = dispatch.select(OPERATOR, q.device.type, *arguments)
    if choice.implementation is None:
        raise NotImplementedError(f"{QUALIFIED} cannot run here: {choice.reason}.")
    choice.implementation.run(*arguments)
    dispatch.observe(QUALIFIED)
    return q, k, v, gate


def register_operator() -> None:
    """Define the operator unless it exists; safe to call any number of times."""
    registration.define(OPERATOR, _SCHEMA, _run, _outputs)


register_operator()

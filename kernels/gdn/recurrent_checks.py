"""What recurrent_gated_delta_rule accepts. Sentences for what it does not; no device is read."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels import arguments
from ascend_patch.kernels.gdn import gating
from ascend_patch.kernels.gdn.chunk_checks import LAYOUTS, check_sizes

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)


def check(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, state_layout: str, out: Tensor | None
) -> None:
    """Raise TypeError for a wrong dtype and ValueError for a wrong shape or layout."""
    if state_layout not in LAYOUTS:
        raise ValueError(f"state_layout must be 'VK' or 'KV', not {state_layout!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != 1:
            raise ValueError(f"{name} must be [1, T, heads, size], not {tuple(x.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("state", state)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    tokens, heads = v.shape[1:3]
    if q.shape != k.shape or q.shape[1] != tokens or q.shape[2] == 0 or heads % q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree, and v {tuple(v.shape)} must "
            "have their tokens and a multiple of their heads"
        )
    check_sizes(k, v)
    if out is not None and (out.shape != v.shape or out.dtype != v.dtype):
        raise ValueError(
            f"out must be {tuple(v.shape)} in {v.dtype}, not {tuple(out.shape)} in {out.dtype}"
        )
    size = (k.shape[3], v.shape[3]) if state_layout == "KV" else (v.shape[3], k.shape[3])
    if state.dim() != 4 or state.shape[1:] != (heads, *size):
        raise ValueError(
            f"state in layout {state_layout} must be [slots, {heads}, {size[0]}, {size[1]}], "
            f"not {tuple(state.shape)}"
        )
    arguments.check_written("state", state)
    if out is not None:
        arguments.check_written("out", out)
        arguments.check_apart("out", out, {"q": q, "k": k})
        arguments.check_apart("out", out, {"v": v}, itself=True)


def check_gates(
    v: Tensor, computed: tuple[Tensor | None, ...], raw: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """g and beta, or a and b: [T, HV]. Raises unless one pair is there, whole, and fits v."""
    some = [[x for x in group if x is not None] for group in (computed, raw)]
    if (len(some[0]), len(some[1])) not in ((len(computed), 0), (0, len(raw))):
        raise ValueError("give either g and beta, or a, b, A_log and dt_bias")
    tokens, heads = v.shape[1:3]
    if some[1]:
        a, b, A_log, dt_bias = some[1]
        gating.check(a, b, A_log, dt_bias)
        if a.shape != (tokens, heads):
            raise ValueError(f"a and b must be [{tokens}, {heads}], not {tuple(a.shape)}")
        return a, b
    for name, x in zip(("g", "beta"), some[0], strict=True):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
        if x.shape != (1, tokens, heads):
            raise ValueError(f"{name} must be [1, {tokens}, {heads}], not {tuple(x.shape)}")
    g, beta = some[0]
    return g[0], beta[0]


def check_requests(
    tokens: int,
    state_indices: Tensor,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    slots: int,
) -> int:
    """How many requests there are; raises where their tokens and slots do not fit."""
    given = (
        ("state_indices", state_indices),
        ("cu_seqlens", cu_seqlens),
        ("num_accepted_tokens", num_accepted_tokens),
    )
    for name, x in given:
        if x is not None and x.dtype not in _INDICES:
            raise TypeError(f"{name} must be int32 or int64, not {x.dtype}")
        if x is not None and x.dim() != 1 and (name != "state_indices" or x.dim() != 2):
            shape = "[N] or [N, S]" if name == "state_indices" else "of one dimension"
            raise ValueError(f"{name} must be {shape}, not {tuple(x.shape)}")
    requests = tokens if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if requests < 0:
        raise ValueError("cu_seqlens must have one entry more than there are requests, not none")
    if num_accepted_tokens is not None and state_indices.dim() == 1:
        raise ValueError(
            "num_accepted_tokens chooses a column of state_indices, which must be [N, S], not "
            f"{tuple(state_indices.shape)}"
        )
    if state_indices.dim() == 2 and state_indices.shape[1] == 0:
        raise ValueError("state_indices must have a column at least")
    for name, x in (("state_indices", state_indices), ("num_accepted_tokens", num_accepted_tokens)):
        if x is not None and x.shape[0] < requests:
            raise ValueError(f"{name} has {x.shape[0]} rows for {requests} requests; one each")
    if cu_seqlens is not None:
        arguments.check_starts("cu_seqlens", cu_seqlens, tokens)
    arguments.check_slots("state_indices", state_indices[:requests], slots)
    return requests

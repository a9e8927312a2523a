"""What chunk_gated_delta_rule accepts. Sentences for what it does not; no device memory is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ascend_patch.kernels import arguments

LAYOUTS = ("VK", "KV")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state_layout: str,
    state: Tensor | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    initial_state: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise TypeError for a wrong dtype and ValueError for a wrong shape or combination."""
    arguments.check_tensors(
        "chunk_gated_delta_rule",
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        {
            "state": state,
            "state_indices": state_indices,
            "has_initial_state": has_initial_state,
            "initial_state": initial_state,
            "out": out,
        },
    )
    if state_layout not in LAYOUTS:
        raise ValueError(f"state_layout must be 'VK' or 'KV', not {state_layout!r}")
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("g", g, 3), ("beta", beta, 3)):
        if x.dim() != rank or x.shape[0] != 1:
            raise ValueError(f"{name} must be [1, T, ...] of rank {rank}, not {tuple(x.shape)}")
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
    for name, x in (("g", g), ("beta", beta)):
        if x.shape[1:] != (tokens, heads):
            raise ValueError(f"{name} must be [1, {tokens}, {heads}], not {tuple(x.shape)}")
    if out is not None and (out.shape != v.shape or out.dtype != v.dtype):
        raise ValueError(
            f"out must be {tuple(v.shape)} in {v.dtype}, not {tuple(out.shape)} in {out.dtype}"
        )
    if out is not None:
        arguments.check_written("out", out)
        read = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        read |= {"state": state, "initial_state": initial_state}
        arguments.check_apart("out", out, read)
    _check_states(k, v, state_layout, state, state_indices, has_initial_state, initial_state)


def check_sizes(k: Tensor, v: Tensor) -> None:
    """Raise ValueError for heads without elements: there is nothing to compute, or to scale by."""
    if not (k.shape[3] and v.shape[3] and v.shape[2]):
        raise ValueError(
            f"heads must have elements: k is {tuple(k.shape)} and v is {tuple(v.shape)}"
        )


def _check_states(
    k: Tensor,
    v: Tensor,
    layout: str,
    state: Tensor | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if state is not None and initial_state is not None:
        raise ValueError("give state, the cache, or initial_state; not both")
    if (state is None) != (state_indices is None):
        raise ValueError("state and state_indices go together: the cache and each one's slot in it")
    if has_initial_state is not None and state is None:
        raise ValueError("has_initial_state is about slots of a cache: give state too")
    if state_indices is not None and state_indices.dtype not in _INDICES:
        raise TypeError(f"state_indices must be int32 or int64, not {state_indices.dtype}")
    for name, x in (("state_indices", state_indices), ("has_initial_state", has_initial_state)):
        if x is not None and x.dim() != 1:
            raise ValueError(f"{name} must be [N], one of each sequence, not {tuple(x.shape)}")
    if has_initial_state is not None and has_initial_state.dtype != torch.bool:
        raise TypeError(f"has_initial_state must be bool, not {has_initial_state.dtype}")
    size = (k.shape[3], v.shape[3]) if layout == "KV" else (v.shape[3], k.shape[3])
    for name, x in (("state", state), ("initial_state", initial_state)):
        if x is None:
            continue
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
        if x.dim() != 4 or x.shape[1:] != (v.shape[2], *size):
            raise ValueError(
                f"{name} in layout {layout} must be [.., {v.shape[2]}, {size[0]}, {size[1]}], "
                f"not {tuple(x.shape)}"
            )
    if state is not None:
        arguments.check_written("state", state)


def check_batch(
    tokens: int,
    starts: tuple[int, ...],
    given: Mapping[str, Tensor | None],
    state: Tensor | None,
) -> None:
    """Raise ValueError where sequences and tokens, or sequences and their states, do not fit."""
    if starts[-1] > tokens:
        raise ValueError(f"the sequences end at token {starts[-1]}, but q has {tokens} tokens")
    for name, x in given.items():
        if x is not None and x.shape[0] < len(starts) - 1:
            raise ValueError(
                f"{name} has {x.shape[0]} entries for {len(starts) - 1} sequences; one each"
            )
    slots = given["state_indices"]
    if state is not None and slots is not None:
        arguments.check_slots("state_indices", slots[: len(starts) - 1], state.shape[0])

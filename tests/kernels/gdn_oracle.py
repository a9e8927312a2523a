"""The gated delta rule token by token, in fp64 with numpy, and random calls to try it on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Case:
    """A batch: lengths of its sequences, heads, sizes, and how states are given."""

    lengths: tuple[int, ...]
    key_heads: int = 2
    value_heads: int = 4
    key_size: int = 64
    value_size: int = 128
    layout: str = "VK"
    states: str = "initial"  # "none", "initial" or "cache"
    state_dtype: str = "float32"
    dtype: str = "float32"
    decay: float = 1.0
    normalise: bool = True
    sliced: bool = False
    same_keys: bool = False
    tail: int = 0  # tokens behind the last sequence

    def __str__(self) -> str:
        shown = [
            f"{n}={v}" for n, v in vars(self).items() if v != Case.__dataclass_fields__[n].default
        ]
        return " ".join(shown)


@dataclass
class Inputs:
    """Tensors of a case, and what the cache held before."""

    case: Case
    arguments: dict
    before: torch.Tensor | None = None
    slots: list[int] = field(default_factory=list)
    carried: list[bool] = field(default_factory=list)


def make_inputs(case: Case, seed: int, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, dtype = sum(case.lengths) + case.tail, getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    widths = [case.key_heads * case.key_size] * 2 + [case.value_heads * case.value_size]
    qkv = normal(tokens, sum(widths) + (7 if case.sliced else 0))
    parts = [
        x if case.sliced else x.contiguous()
        for x in qkv.to(dtype).to(device).split([*widths, 7] if case.sliced else widths, -1)
    ][:3]
    q, k, v = (
        x.unflatten(-1, (heads, -1))[None]
        for x, heads in zip(parts, (case.key_heads, case.key_heads, case.value_heads), strict=True)
    )
    if case.same_keys:
        k.copy_(k[:, :1].expand_as(k).clone())
    if not case.normalise:
        k.mul_(case.key_size**-0.5)
    g = -case.decay * torch.rand(1, tokens, case.value_heads, generator=generator) ** 2
    beta = torch.rand(1, tokens, case.value_heads, generator=generator)
    arguments = {
        "q": q, "k": k, "v": v, "g": g.to(device), "beta": beta.to(device),
        "state_layout": case.layout, "use_qk_l2norm_in_kernel": case.normalise,
    }  # fmt: skip
    starts = torch.tensor([0, *np.cumsum(case.lengths)], dtype=torch.int32)
    arguments["cu_seqlens"] = starts.to(device)
    found = Inputs(case, arguments)
    last = (case.key_size, case.value_size)
    shape = (case.value_heads, *(last if case.layout == "KV" else last[::-1]))
    count = len(case.lengths)
    if case.states == "initial":
        found.before = normal(count, *shape).to(getattr(torch, case.state_dtype)).to(device)
        arguments["initial_state"] = found.before.clone()
        found.slots, found.carried = list(range(count)), [True] * count
    elif case.states == "cache":
        slots = torch.randperm(count + 3, generator=generator)[:count]
        if count > 2:
            slots[1] = -1
        carried = torch.rand(count, generator=generator) < 0.6
        found.before = normal(count + 3, *shape).to(getattr(torch, case.state_dtype)).to(device)
        arguments["state"] = found.before.clone()
        # A model's are a column of its block table.
        table = torch.full((count, 3), count + 99, dtype=torch.int32)
        table[:, 1] = slots
        arguments["state_indices"] = table.to(device)[:, 1]
        arguments["has_initial_state"] = carried.to(device)
        found.slots, found.carried = slots.tolist(), carried.tolist()
    return found


def recurrence(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, HV, V] and final states [N, HV, K, V]."""
    case = inputs.case
    q, k, v, g, beta = (
        inputs.arguments[name][0].double().cpu().numpy() for name in ("q", "k", "v", "g", "beta")
    )
    if case.normalise:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    group = case.value_heads // case.key_heads
    q, k = (np.repeat(x, group, axis=1) for x in (q, k))
    out = np.zeros_like(v)
    finals, at = [], 0
    for sequence, length in enumerate(case.lengths):
        state = np.zeros((case.value_heads, case.key_size, case.value_size))
        if inputs.before is not None and inputs.slots[sequence] >= 0 and inputs.carried[sequence]:
            held = inputs.before[inputs.slots[sequence]].double().cpu().numpy()
            state = held if case.layout == "KV" else held.swapaxes(-1, -2)
        for token in range(at, at + length):
            state = state * np.exp(g[token])[:, None, None]
            known = np.einsum("hkv,hk->hv", state, k[token])
            change = beta[token][:, None] * (v[token] - known)
            state = state + k[token][:, :, None] * change[:, None, :]
            out[token] = np.einsum("hkv,hk->hv", state, q[token]) * case.key_size**-0.5
        at += length
        finals.append(state)
    return out, np.stack(finals) if finals else np.zeros((0,))

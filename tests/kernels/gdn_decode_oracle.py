"""Decode steps of the gated delta rule in fp64 with numpy, and random calls to try them on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class DecodeCase:
    """A step: how many tokens each request has, heads, sizes, and where states are.

    ``lengths`` None: one token for each of ``requests``. ``width`` 0: state_indices [N]; else
    [N, width]. ``padded``: requests without a state. ``tail``: tokens behind the last request.
    """

    requests: int = 3
    lengths: tuple[int, ...] | None = None
    width: int = 0
    accepted: bool = True
    padded: tuple[int, ...] = ()
    key_heads: int = 2
    value_heads: int = 4
    key_size: int = 64
    value_size: int = 128
    layout: str = "VK"
    dtype: str = "float32"
    state_dtype: str = "float32"
    raw: bool = True
    normalise: bool = True
    sliced: bool = False
    decay: float = 1.0
    tail: int = 0
    rows: int = 0  # of state_indices, beyond those of the requests
    scale: float | None = None

    def __str__(self) -> str:
        fields = DecodeCase.__dataclass_fields__
        return " ".join(f"{n}={v}" for n, v in vars(self).items() if v != fields[n].default)

    @property
    def counts(self) -> list[int]:
        """Tokens of each request."""
        return [1] * self.requests if self.lengths is None else list(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.counts) + self.tail


@dataclass
class DecodeInputs:
    """Tensors of a case, what the cache held before, and slots and columns as Python has them."""

    case: DecodeCase
    arguments: dict
    before: torch.Tensor
    slots: list[list[int]]
    begins: list[int]


def make_decode(case: DecodeCase, seed: int, device: str = "cpu") -> DecodeInputs:
    """Slots are drawn without repetition from a cache with five more of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens, count, dtype = case.tokens, len(case.counts), getattr(torch, case.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    widths = [case.key_heads * case.key_size] * 2 + [case.value_heads * case.value_size, 8]
    packed = normal(tokens, sum(widths)).to(dtype).to(device)
    parts = [x if case.sliced else x.contiguous() for x in packed.split(widths, -1)][:3]
    heads = case.key_heads, case.key_heads, case.value_heads
    q, k, v = (x.unflatten(-1, (n, -1))[None] for x, n in zip(parts, heads, strict=True))
    if not case.normalise:
        k.mul_(case.key_size**-0.5)
    arguments = {
        "q": q, "k": k, "v": v, "state_layout": case.layout,
        "use_qk_l2norm_in_kernel": case.normalise,
    }  # fmt: skip
    if case.scale is not None:
        arguments["scale"] = case.scale
    gates = 3 * normal(tokens, 2 * case.value_heads + 1)
    if case.raw:
        a, b = gates.to(dtype).to(device)[:, :-1].split(case.value_heads, 1)
        arguments |= {"a": a if case.sliced else a.contiguous(), "b": b.contiguous()}
        arguments["A_log"] = normal(case.value_heads).to(device)
        arguments["dt_bias"] = normal(case.value_heads).to(dtype).to(device)
    else:
        g, b = gates[:, :-1].split(case.value_heads, 1)
        g = -case.decay * torch.rand(g.shape, generator=generator) ** 2
        arguments |= {"g": g[None].to(device), "beta": b.sigmoid()[None].to(dtype).to(device)}
    if case.lengths is not None:
        starts = torch.tensor([0, *np.cumsum(case.counts)], dtype=torch.int32)
        arguments["cu_seqlens"] = starts.to(device)
    width = max(case.width, 1)
    slots = torch.randperm(count * width + 5, generator=generator)[: count * width]
    slots = slots.reshape(count, width)
    slots[list(case.padded)] = -1
    rows = torch.cat((slots, torch.full((case.rows, width), -1))).to(torch.int32).to(device)
    if case.sliced:
        # In vLLM they are columns of a table of blocks; what is between them is not ours.
        rows = torch.stack((rows, torch.zeros_like(rows)), 2).flatten(1)[:, ::2]
    arguments["state_indices"] = rows if case.width else rows[:, 0]
    begins = [0] * count
    if case.width and case.accepted:
        accepted = torch.randint(1, width + 1, (count + case.rows,), generator=generator)
        arguments["num_accepted_tokens"] = accepted.to(torch.int32).to(device)
        begins = [int(n) - 1 for n in accepted[:count]]
    last = (case.key_size, case.value_size)
    shape = (case.value_heads, *(last if case.layout == "KV" else last[::-1]))
    # A slot is a page, and may have something else behind it.
    page = normal(count * width + 5, int(np.prod(shape)) + (16 if case.sliced else 0))
    page = page.to(getattr(torch, case.state_dtype)).to(device)
    arguments["state"] = page[:, : int(np.prod(shape))].unflatten(1, shape)
    before = arguments["state"].clone()
    return DecodeInputs(case, arguments, before, slots.tolist(), begins)


def _numbers(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def decode(inputs: DecodeInputs) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Outputs [T, HV, V], and the state [HV, K, V] of each slot that is written."""
    case, given = inputs.case, inputs.arguments
    q, k, v = (_numbers(given[name][0]) for name in ("q", "k", "v"))
    if case.raw:
        x = _numbers(given["a"]) + _numbers(given["dt_bias"])
        g = -np.exp(_numbers(given["A_log"])) * np.logaddexp(0.0, x)
        beta = 1.0 / (1.0 + np.exp(-_numbers(given["b"])))
    else:
        g, beta = _numbers(given["g"][0]), _numbers(given["beta"][0])
    if case.normalise:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    scale = case.key_size**-0.5 if case.scale is None else case.scale
    out, written = np.zeros_like(v), {}
    token = 0
    for request, count in enumerate(case.counts):
        slots = inputs.slots[request]
        begin = slots[inputs.begins[request]]
        if begin < 0:
            token += count
            continue
        state = _numbers(inputs.before[begin])
        state = state if case.layout == "KV" else state.swapaxes(-1, -2)
        for position in range(count):
            after = np.empty_like(state)
            for head in range(case.value_heads):
                row = k[token, head * case.key_heads // case.value_heads]
                asks = q[token, head * case.key_heads // case.value_heads]
                decayed = np.exp(g[token, head]) * state[head]
                change = beta[token, head] * (v[token, head] - row @ decayed)
                after[head] = decayed + np.outer(row, change)
                out[token, head] = scale * (asks @ after[head])
            state = after
            if not case.width:
                written[slots[0]] = state
            elif position < case.width and slots[position] >= 0:
                written[slots[position]] = state
            token += 1
    return out, written

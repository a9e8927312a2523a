"""The causal convolutions token by token, in fp64 with numpy, and random calls to try them on.

What a call may not read is NaN: tokens of padding and behind the last sequence, places of the cache
that no sequence begins with. A call that lets one in shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from ascend_patch.kernels import gdn


@dataclass(frozen=True)
class ConvCase:
    """A batch of sequences.

    ``places`` are those of a slot, W - 1 if 0. ``cache``: `transposed`, [slots, L, C] seen as
    [slots, C, L], as vLLM keeps it; `gaps`, that with something between slots; `plain`; or `none`.
    ``table``: the host knows the lengths. ``given``: the caller gives ``out``.
    """

    lengths: tuple[int, ...] = (1,)
    channels: int = 24
    width: int = 4
    dtype: str = "float32"
    weight_dtype: str = ""
    state_dtype: str = ""
    bias: bool = True
    silu: bool = True
    places: int = 0
    cache: str = "transposed"
    padded: tuple[int, ...] = ()
    sliced: bool = False
    tail: int = 0
    table: bool = True
    given: bool = False
    # Of decode: one token each without query_start_loc; how many were accepted.
    plain: bool = False
    accepted: tuple[int, ...] = ()
    columns: bool = False

    def __str__(self) -> str:
        shown = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "lengths"]
        usual = [f"{f.name}={f.default}" for f in fields(self)]
        return " ".join([str(self.lengths).replace(" ", ""), *(x for x in shown if x not in usual)])


@dataclass
class ConvInputs:
    """A call, and what it must give: fp64 outputs, sums of absolutes, whose rows, the cache."""

    case: ConvCase
    arguments: dict
    wanted: np.ndarray
    weights: np.ndarray
    written: np.ndarray
    cache: torch.Tensor | None


def make_conv(case: ConvCase, seed: int, device: str = "cpu", update: bool = False) -> ConvInputs:
    """A call of causal_conv1d, or of causal_conv1d_update."""
    generator = torch.Generator().manual_seed(seed)
    tokens, channels, width = sum(case.lengths) + case.tail, case.channels, case.width
    starts = [0, *np.cumsum(case.lengths).tolist()]
    count = len(case.lengths)

    def normal(*shape: int, dtype: str = "") -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, dtype or case.dtype))

    wide = normal(tokens, channels + (13 if case.sliced else 0))
    x = wide[:, 8 : 8 + channels] if case.sliced else wide
    x[starts[-1] :] = float("nan")
    for n in case.padded:
        x[starts[n] : starts[n + 1]] = float("nan")
    weight = normal(channels, width, dtype=case.weight_dtype)
    if case.columns:
        weight = weight.t().contiguous().t()
    arguments = {"x": x, "weight": weight, "bias": normal(channels) if case.bias else None}
    arguments["activation"] = "silu" if case.silu else None
    slots = torch.randperm(count + 3, generator=generator)[:count].int()
    slots[list(case.padded)] = -1
    carried = torch.rand(count, generator=generator) < 0.6
    # The first without tokens is without a state too: whatever its slot holds stays.
    if 0 in case.lengths:
        carried[case.lengths.index(0)] = False
    before = width - 1
    begins = np.zeros((count, channels, before))
    cache = after = None
    if case.cache != "none":
        cache = torch.full(
            (count + 3, channels, case.places or before), float("nan"), dtype=torch.float64
        )
        for n, slot in enumerate(slots.tolist()):
            first = (case.accepted[n] if case.accepted else 1) - 1
            if slot >= 0 and (update or carried[n]):
                held = normal(channels, before, dtype=case.state_dtype).double()
                cache[slot, :, first : first + before] = held
                begins[n] = held.numpy()
        cache = cache.to(getattr(torch, case.state_dtype or case.dtype))
        after = cache.clone()
    f64 = {name: arguments[name].double().numpy() for name in ("x", "weight")}
    bias = arguments["bias"].double().numpy() if case.bias else np.zeros(channels)
    wanted, weights = np.zeros((tokens, channels)), np.zeros((tokens, channels))
    written = np.zeros(tokens, dtype=bool)
    for n, length in enumerate(case.lengths):
        if n in case.padded:
            continue
        past = [begins[n][:, k] for k in range(before)]
        for token in range(starts[n], starts[n + 1]):
            past.append(f64["x"][token])
            terms = [f64["weight"][:, j] * past[len(past) - width + j] for j in range(width)]
            wanted[token] = bias + sum(terms)
            weights[token] = np.abs(bias) + sum(map(np.abs, terms))
            written[token] = True
        if after is not None and length:
            slot = int(slots[n])
            kept = past[len(past) - before :] if not case.accepted else past[1:]
            for place, value in enumerate(kept):
                after[slot, :, place] = torch.from_numpy(value).to(after.dtype)
    if case.silu:
        wanted = wanted / (1 + np.exp(-wanted))
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    if cache is not None:
        arguments["conv_state"] = _stored(cache, case.cache, device)
        arguments["state_indices"] = slots.to(device)
    _sequences(case, arguments, starts, carried, update, device)
    if case.given:
        arguments["out"] = torch.full_like(
            arguments["x"], float("nan"), memory_format=torch.contiguous_format
        )
    return ConvInputs(case, arguments, wanted, weights, written, after)


def _sequences(case, arguments, starts, carried, update, device) -> None:
    """How the call says which tokens belong together, and what they begin with."""
    query_start_loc = torch.tensor(starts, dtype=torch.int32)
    if not update:
        if case.cache != "none":
            arguments["has_initial_state"] = carried.to(device)
        if case.table:
            metadata = gdn.build_chunk_metadata(query_start_loc, torch.device(device))
            arguments["chunk_metadata"] = metadata
        else:
            arguments["query_start_loc"] = query_start_loc.to(device)
        return
    if not case.plain:
        # Longer than there are sequences, as a builder's buffer is.
        longer = torch.cat((query_start_loc, query_start_loc[-1:]))
        arguments["query_start_loc"] = longer.to(device)
        arguments["max_query_len"] = max((*case.lengths, 1))
        # A column of a table, as the slots of speculative steps are.
        indices = arguments["state_indices"]
        arguments["state_indices"] = torch.stack((indices, indices + 1), 1)[:, 0]
    if case.accepted:
        accepted = torch.tensor(case.accepted, dtype=torch.int32)
        arguments["num_accepted_tokens"] = accepted.to(device)


def _stored(cache: torch.Tensor, how: str, device: str) -> torch.Tensor:
    """The same numbers, laid out another way."""
    if how == "plain":
        return cache.clone().to(device)
    slots, channels, places = cache.shape
    rows = places + (2 if how == "gaps" else 0)
    stored = torch.full((slots, rows, channels), 7.0, dtype=cache.dtype, device=device)
    stored = stored[:, :places].transpose(1, 2)
    return stored.copy_(cache)

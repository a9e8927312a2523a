"""What scripts/bench gdn_conv holds every result to: the formulas in fp64, a block of channels at a
time on the arguments' device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BLOCK = 512


def apart(found: Any, wanted: Any) -> float:
    """Root mean square of the error over that of what is wanted; infinite where it is no number."""
    error = total = 0.0
    for rows, want in zip(found.split(4096), wanted.split(4096), strict=True):
        error += float((rows.double() - want.double()).square().sum())
        total += float(want.double().square().sum())
    share = (error / total) ** 0.5 if total else float("inf")
    return share if share == share else float("inf")


def prefill(x: Any, weight: Any, cache: Any, slots: Any, carried: Any, starts: Any) -> list[Any]:
    """The outputs [T, C] and the cache [slots, W - 1, C] afterwards."""
    import torch

    width, device = weight.shape[1], x.device
    lengths = starts.diff().to(device)
    begin = starts[:-1].long().to(device)
    sequence = torch.arange(len(begin), device=device).repeat_interleave(lengths)
    token = torch.arange(len(x), device=device)
    out, after = torch.empty_like(x, memory_format=torch.contiguous_format).float(), cache.clone()
    for block in blocks(x.shape[1]):
        history = cache[slots][..., block].double() * carried[:, None, None]
        total = 0.0
        for back in range(width):
            inside = token - back >= begin[sequence]
            place = (width - 1 - back + token - begin[sequence]).clamp(max=width - 2)
            value = torch.where(
                inside[:, None],
                x[(token - back).clamp(min=0)][:, block].double(),
                history[sequence, place] if back else 0.0,
            )
            total = total + value * weight[block, width - 1 - back].double()
        out[:, block] = torch.nn.functional.silu(total).float()
        for place in range(width - 1):
            at = lengths + place - (width - 1)
            value = torch.where(
                (at >= 0)[:, None],
                x[(begin + at).clamp(min=0)][:, block].double(),
                history[
                    torch.arange(len(at), device=device), (at + width - 1).clamp(max=width - 2)
                ],
            )
            after[slots, place, block] = value.to(cache.dtype)
    return [out, after]


def update(x: Any, weight: Any, cache: Any, slots: Any, tokens: int, accepted: Any) -> list[Any]:
    """The outputs [T, C] and the cache [slots, places, C] afterwards."""
    import torch

    width, batch = weight.shape[1], len(slots)
    offset = torch.zeros_like(slots) if accepted is None else accepted.long() - 1
    places = offset[:, None] + torch.arange(width - 1, device=x.device)
    past = cache[slots[:, None], places].double()
    rows = torch.cat((past, x.double().unflatten(0, (batch, tokens))), 1)
    taps = weight.double().t()
    sums = sum(rows[:, j : j + tokens] * taps[j] for j in range(width))
    after = cache.clone()
    kept = rows[:, 1:] if accepted is not None else rows[:, tokens:]
    after[slots, : kept.shape[1]] = kept.to(cache.dtype)
    return [torch.nn.functional.silu(sums).flatten(0, 1), after]


def norm(x: Any, gate: Any, weight: Any, eps: float = 1e-6) -> Any:
    """[T, heads, D], a part of the tokens at a time."""
    import torch

    found = torch.empty_like(x, dtype=torch.float32)
    for part in torch.arange(len(x), device=x.device).split(2048):
        value, factor = x[part].double(), gate[part].double()
        value = value / (value.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        found[part] = (value * torch.nn.functional.silu(factor)).float()
    return found


def blocks(channels: int) -> Iterator[slice]:
    for first in range(0, channels, BLOCK):
        yield slice(first, min(channels, first + BLOCK))

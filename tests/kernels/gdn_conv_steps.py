"""One stream of tokens through the convolutions in every way that it can be cut."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ascend_patch.kernels import gdn


@dataclass(frozen=True)
class Stream:
    """Sequences of tokens, and the weights that all ways share."""

    lengths: tuple[int, ...]
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    seed: int
    activation: str | None

    @property
    def starts(self) -> list[int]:
        return [sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]

    def cache(self, places: int) -> torch.Tensor:
        """[slots, C, places], a slot each in another order, full of NaN."""
        shape = (len(self.lengths), places, self.x.shape[1])
        return torch.full(shape, float("nan"), dtype=self.x.dtype, device=self.x.device).transpose(
            1, 2
        )

    @property
    def slots(self) -> torch.Tensor:
        count = len(self.lengths)
        return torch.arange(count - 1, -1, -1, dtype=torch.int32, device=self.x.device)


def make_stream(
    lengths, width, dtype, seed, channels=11, device="cpu", activation: str | None = None
) -> Stream:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        found = torch.randn(*shape, generator=generator)
        return found.to(getattr(torch, dtype)).to(device)

    x = normal(sum(lengths), channels)
    return Stream(tuple(lengths), x, normal(channels, width), normal(channels), seed, activation)


def _prefill(stream: Stream, counts, done, cache, table=True) -> list[torch.Tensor]:
    """The next ``counts`` tokens of each sequence; outputs, a sequence each."""
    pieces = [
        stream.x[start + before : start + before + count]
        for start, before, count in zip(stream.starts, done, counts, strict=False)
    ]
    starts = torch.tensor([sum(counts[:n]) for n in range(len(counts) + 1)], dtype=torch.int32)
    device = stream.x.device
    how = (
        {"chunk_metadata": gdn.build_chunk_metadata(starts, device)}
        if table
        else {"query_start_loc": starts.to(device)}
    )
    out = gdn.causal_conv1d(
        torch.cat(pieces),
        stream.weight,
        stream.bias,
        activation=stream.activation,
        conv_state=cache,
        state_indices=stream.slots,
        has_initial_state=torch.tensor([before > 0 for before in done], device=device),
        **how,
    )
    return list(out.split(list(counts)))


def whole(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """All in one go; outputs and states."""
    cache = stream.cache(stream.weight.shape[1] - 1)
    out = _prefill(stream, stream.lengths, [0] * len(stream.lengths), cache)
    return torch.cat(out), cache


def in_pieces(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked prefill: random pieces, none at all now and then, with a table and without."""
    chance = random.Random(stream.seed)
    cache = stream.cache(stream.weight.shape[1] - 1)
    done = [0] * len(stream.lengths)
    found: list[list[torch.Tensor]] = [[] for _ in stream.lengths]
    while any(d < length for d, length in zip(done, stream.lengths, strict=True)):
        most = chance.choice((1, 3, 64, 100))
        counts = [
            min(chance.randint(0, most), length - d)
            for d, length in zip(done, stream.lengths, strict=True)
        ]
        # A sequence whose first piece is empty has no state yet: has_initial_state stays false.
        for n, out in enumerate(_prefill(stream, counts, done, cache, chance.random() < 0.5)):
            found[n].append(out)
        done = [d + count for d, count in zip(done, counts, strict=True)]
    return torch.cat([out for outs in found for out in outs]), cache


def in_tokens(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token of each by prefill, the others one by one; padding where one has ended."""
    cache = stream.cache(stream.weight.shape[1] - 1)
    ones = [1] * len(stream.lengths)
    out = torch.empty_like(stream.x)
    first = _prefill(stream, ones, [0] * len(ones), cache)
    out[stream.starts[:-1]] = torch.cat(first)
    for step in range(1, max(stream.lengths)):
        live = torch.tensor([step < length for length in stream.lengths], device=out.device)
        rows = [min(s + step, len(out) - 1) for s in stream.starts[:-1]]
        given = stream.x[rows].masked_fill(~live[:, None], float("nan"))
        got = gdn.causal_conv1d_update(
            given,
            cache,
            stream.weight,
            stream.bias,
            activation=stream.activation,
            state_indices=torch.where(live, stream.slots, -1),
        )
        for n, row in enumerate(rows):
            if live[n]:
                out[row] = got[n]
            else:
                assert (got[n] == 0).all()
    return out, cache


def in_drafts(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative decoding: each step has wrong tokens at its end, which the next step drops."""
    chance = random.Random(stream.seed + 1)
    most, before = 4, stream.weight.shape[1] - 1
    cache = stream.cache(before + most - 1)
    count = len(stream.lengths)
    out = torch.empty_like(stream.x)
    out[stream.starts[:-1]] = torch.cat(_prefill(stream, [1] * count, [0] * count, cache))
    done, accepted = [1] * count, [1] * count
    while any(d < length for d, length in zip(done, stream.lengths, strict=True)):
        right, lengths, rows = [], [], []
        for start, d, length in zip(stream.starts, done, stream.lengths, strict=False):
            good = min(chance.randint(1, most), length - d)
            drafted = chance.randint(good, most) if good else 0
            right.append(good)
            lengths.append(drafted)
            rows += [stream.x[start + d : start + d + good]]
            rows += [torch.full_like(stream.x[: drafted - good], 1e3 * (chance.random() - 0.5))]
        starts = torch.tensor([sum(lengths[:n]) for n in range(count + 1)], device=out.device)
        got = gdn.causal_conv1d_update(
            torch.cat(rows),
            cache,
            stream.weight,
            stream.bias,
            activation=stream.activation,
            state_indices=stream.slots,
            num_accepted_tokens=torch.tensor(accepted, device=out.device),
            query_start_loc=starts,
            max_query_len=most,
        )
        for n, (at, good) in enumerate(zip(starts.tolist(), right, strict=False)):
            to = stream.starts[n] + done[n]
            out[to : to + good] = got[at : at + good]
            done[n] += good
            accepted[n] = good or accepted[n]
    # What a prefill would have left: the last inputs, where the accepted ones end.
    last = cache.new_empty(count, cache.shape[1], before)
    for slot, taken in zip(stream.slots.tolist(), accepted, strict=True):
        last[slot] = cache[slot, :, taken - 1 : taken - 1 + before]
    return out, last

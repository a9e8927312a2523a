"""Windows that TND refuses: each request with several queries alone, the others together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascend_patch.kernels.attention import calls, keys
from ascend_patch.kernels.attention.batch import Batch
from ascend_patch.kernels.attention.calls import Heads
from ascend_patch.kernels.attention.case import Route


class Parts(NamedTuple):
    """A batch, sorted: ``several`` are (request, start, end), ``single`` requests with one query.

    ``tokens``: the rows of the single queries, or None where all rows are that, in order.
    """

    several: list[tuple[int, int, int]]
    single: list[int]
    tokens: Tensor | None


def parts(batch: Batch, device: torch.device) -> Parts:
    """Made once a step; requests without queries are in no part."""
    found: Parts | None = batch.derived.get("parts")
    if found is None:
        spans = list(zip(range(len(batch.ends)), batch.starts, batch.ends, strict=True))
        single = [request for request, start, end in spans if end - start == 1]
        several = [span for span in spans if span[2] - span[1] > 1]
        starts = [batch.starts[request] for request in single]
        tokens = torch.tensor(starts, device=device) if several and single else None
        found = batch.derived["parts"] = Parts(several, single, tokens)
    return found


def of_this_step(
    route: Route, batch: Batch, query: Tensor, key: Tensor, value: Tensor, out: Tensor, heads: Heads
) -> None:
    """Prefill: query, out [T, Hq, D]; key, value [T, Hk, D]."""
    several, single, tokens = parts(batch, query.device)
    for _, start, end in several:
        own = slice(start, end)
        out[own].copy_(calls.alone(route, query[own], key[own], value[own], heads))
    if single:
        # A prompt of one token sees itself.
        chosen = (query, key, value) if tokens is None else (x[tokens] for x in (query, key, value))
        q, k, v = chosen
        found = calls.single_queries(q, k[:, None], v[:, None], [1] * len(single), heads)
        _put(out, tokens, found)


def of_cache(
    route: Route,
    batch: Batch,
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    out: Tensor,
    heads: Heads,
) -> None:
    """query, out [T, Hq, D]; caches [blocks, block size, Hk, D]. Only keys in sight are copied."""
    before = route.pre_tokens or 0
    several, single, tokens = parts(batch, query.device)
    for request, start, end in several:
        length = batch.kv_lens[request]
        first = max(0, length - (end - start) - before)
        if length:
            key, value = keys.of_request(caches, batch, request, first)
            out[start:end].copy_(calls.alone(route, query[start:end], key, value, heads))
        else:
            out[start:end].zero_()
    if single:
        # A single query is at the last position, so what it sees are the last keys.
        key, value, lens = keys.last_of(caches, batch, single, before + 1)
        rows = query if tokens is None else query[tokens]
        _put(out, tokens, calls.single_queries(rows, key, value, lens, heads))


def _put(out: Tensor, tokens: Any, found: Tensor) -> None:
    if tokens is None:
        out.copy_(found)
    else:
        out[tokens] = found

"""What TND has no kernel for: each request with several queries alone, the others together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ascend_patch.kernels.attention import calls, keys
from ascend_patch.kernels.attention.batch import Batch, cuts
from ascend_patch.kernels.attention.calls import Heads
from ascend_patch.kernels.attention.case import Route


class Parts(NamedTuple):
    """A batch, sorted: ``several`` are (request, start, end), ``single`` requests with one query.

    ``tokens`` and ``requests`` pick the single ones out of rows and of the block table; None where
    all rows, or all requests, are that, in order.
    """

    several: list[tuple[int, int, int]]
    single: list[int]
    tokens: Tensor | None
    requests: Tensor | None


def parts(batch: Batch, device: torch.device) -> Parts:
    """Made once a step; requests without queries or without keys are in no part."""
    found: Parts | None = batch.derived.get("parts")
    if found is None:
        every = zip(range(len(batch.ends)), batch.starts, batch.ends, strict=True)
        spans = [span for span in every if batch.kv_lens[span[0]]]
        several = [span for span in spans if span[2] - span[1] > 1]
        single = [span for span in spans if span[2] - span[1] == 1]
        tokens = requests = None
        if len(single) < batch.end:
            tokens = torch.tensor([start for _, start, _ in single], device=device)
        chosen = [request for request, _, _ in single]
        if len(chosen) < len(batch.ends):
            requests = torch.tensor(chosen, device=device)
        found = batch.derived["parts"] = Parts(several, chosen, tokens, requests)
    return found


def of_this_step(
    route: Route, batch: Batch, query: Tensor, key: Tensor, value: Tensor, out: Tensor, heads: Heads
) -> None:
    """Prefill: query, out [T, Hq, D]; key, value [T, Hk, D]."""
    key, value = key.flatten(1), value.flatten(1)
    several, single, tokens, _ = parts(batch, query.device)
    for _, start, end in several:
        own = slice(start, end)
        found = calls.alone(route, query[own][None], key[None, own], value[None, own], heads)
        out[own].copy_(found[0])
    if single:
        # A prompt of one token sees itself.
        q, k, v = (x if tokens is None else x[tokens] for x in (query, key, value))
        lens = [1] * len(single)
        _put(out, tokens, calls.single_queries(q, k[:, None], v[:, None], lens, None, heads))


def of_cache(
    route: Route,
    batch: Batch,
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    out: Tensor,
    heads: Heads,
) -> None:
    """query, out [T, Hq, D]; caches [blocks, block size, Hk, D]."""
    several, single, tokens, requests = parts(batch, query.device)
    if len(several) + len(single) < len(batch.ends):
        # A query of a request without keys sees nothing.
        out.zero_()
    if several or route.cache != "gathered":
        key, value, table = keys.paged(caches, batch, tnd=False)
    for request, start, end in several:
        row = table[request : request + 1]
        lens = [batch.kv_lens[request]]
        found = calls.alone(route, query[None, start:end], key, value, heads, lens, row)
        out[start:end].copy_(found[0])
    if not single:
        return
    rows = query if tokens is None else query[tokens]
    if route.cache == "gathered":
        # A single query is at the last position, so what it sees are the last keys.
        window = (route.pre_tokens or 0) + 1
        key, value, lens = keys.last_of(caches, batch, single, window)
        _put(out, tokens, calls.single_queries(rows, key, value, lens, None, heads))
        return
    lens = [batch.kv_lens[request] for request in single]
    table = table if requests is None else table[requests]
    found = [
        calls.single_queries(rows[part], key, value, lens[part], table[part], heads)
        for part in cuts(lens, key.shape[0], key.shape[1])
    ]
    _put(out, tokens, found[0] if len(found) == 1 else torch.cat(found))


def _put(out: Tensor, tokens: Tensor | None, found: Tensor) -> None:
    if tokens is None:
        out.copy_(found)
    else:
        out[tokens] = found

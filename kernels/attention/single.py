"""Windows that TND refuses: each request with several queries alone, the others together."""

from __future__ import annotations

from torch import Tensor

from ascend_patch.kernels.attention import calls, keys
from ascend_patch.kernels.attention.batch import Batch
from ascend_patch.kernels.attention.calls import Heads
from ascend_patch.kernels.attention.case import Route


def of_this_step(
    route: Route, batch: Batch, query: Tensor, key: Tensor, value: Tensor, out: Tensor, heads: Heads
) -> None:
    """Prefill: query, out [T, Hq, D]; key, value [T, Hk, D]."""
    for start, end in zip(batch.starts, batch.ends, strict=True):
        if end - start > 1:
            part = slice(start, end)
            out[part].copy_(calls.alone(route, query[part], key[part], value[part], heads))
    tokens = [
        start for start, end in zip(batch.starts, batch.ends, strict=True) if end - start == 1
    ]
    if tokens:
        found = calls.single_queries(
            query[tokens], key[tokens][:, None], value[tokens][:, None], [1] * len(tokens), heads
        )
        out[tokens] = found


def of_cache(
    route: Route,
    batch: Batch,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    heads: Heads,
) -> None:
    """query, out [T, Hq, D]; caches [blocks, block size, Hk, D]. Only keys in sight are copied."""
    before = route.pre_tokens or 0
    singles: list[int] = []
    for request, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        count, length = end - start, batch.kv_lens[request]
        if count == 1:
            singles.append(request)
        elif count and not length:
            out[start:end].zero_()
        elif count:
            first = max(0, length - count - before)
            key, value = (
                keys.of_request(cache, batch, request, first, length)
                for cache in (key_cache, value_cache)
            )
            out[start:end].copy_(calls.alone(route, query[start:end], key, value, heads))
    if not singles:
        return
    # Its own position is the last, so a single query's window is the last keys.
    key, value, lens = keys.last_of(key_cache, value_cache, batch, singles, before + 1)
    if len(singles) == len(query):
        out.copy_(calls.single_queries(query, key, value, lens, heads))
        return
    tokens = [batch.starts[request] for request in singles]
    out[tokens] = calls.single_queries(query[tokens], key, value, lens, heads)

"""Random requests over a paged cache, attention in fp64, and how far an answer is from it."""

from __future__ import annotations

import numpy
import torch

HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
BLOCK = 128
random = torch.Generator()


def start(seed: int) -> None:
    torch.set_num_threads(1)
    random.manual_seed(seed)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=random).to(dtype)


def fp64(x) -> numpy.ndarray:
    return x.double().numpy()


def ratio(got, wanted) -> float:
    """The largest error, in units of what float32 arithmetic and one rounding may make."""
    found, wanted = fp64(got), numpy.asarray(wanted, dtype=float)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if not wanted.size:
        return 0.0
    if not numpy.isfinite(found).all():
        return float("inf")
    largest = numpy.abs(wanted).max()
    if got.dtype not in HALF_ULP:
        return float(numpy.abs(found - wanted).max())
    allowed = numpy.abs(wanted) * HALF_ULP[got.dtype] * 1.01 + 1e-5 * largest
    return float((numpy.abs(found - wanted) / numpy.maximum(allowed, 1e-30)).max())


def dense(query, key, value, *, scale, visible=None, sink=None) -> numpy.ndarray:
    """query [S, N, D], key [K, KV_N, D], value [K, KV_N, Dv]; visible [S, K]."""
    out = numpy.zeros((*query.shape[:2], value.shape[2]))
    for head in range(query.shape[1]):
        own = head * key.shape[1] // query.shape[1]
        scores = scale * query[:, head] @ key[:, own].T
        if visible is not None:
            scores = numpy.where(visible, scores, -numpy.inf)
        top = scores.max(1, keepdims=True)
        if sink is not None:
            top = numpy.maximum(top, sink[head])
        weights = numpy.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        if sink is not None:
            total = total + numpy.exp(sink[head] - top)
        out[:, head] = weights / total @ value[:, own]
    return out


class Paged:
    """Requests whose keys are in a paged cache: blocks in any order, some shared, some unused."""

    def __init__(self, contexts, queries, heads=4, kv_heads=2, size=128, dtype=torch.bfloat16):
        self.queries, self.lengths = (
            queries,
            [c + q for c, q in zip(contexts, queries, strict=True)],
        )
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        columns = max(-(-length // BLOCK) for length in self.lengths) + 1
        blocks = columns * len(queries) + 2
        order = torch.randperm(blocks, generator=random)[: columns * len(queries)]
        self.table = order.view(len(queries), columns).int()
        self.table[-1, 0] = self.table[0, 0]
        self.caches = [randn(blocks, BLOCK, kv_heads, size, dtype=dtype) for _ in range(2)]
        self.query = randn(sum(queries), heads, size, dtype=dtype)
        self.scale = size**-0.5

    def flat(self):
        return [cache.flatten(2) for cache in self.caches]

    def expected(self, causal=True, window=None, sink=None):
        rows, first = [], 0
        for request, (count, length) in enumerate(zip(self.queries, self.lengths, strict=True)):
            keys, values = (
                numpy.concatenate([fp64(cache[int(block)]) for block in self.table[request]])[
                    :length
                ]
                for cache in self.caches
            )
            own = length - count + numpy.arange(count)[:, None]
            places = numpy.arange(length)[None]
            visible = (places <= own) if causal else numpy.ones((count, length), bool)
            if window:
                visible &= own - places < window
            query = fp64(self.query[first : first + count])
            rows.append(dense(query, keys, values, scale=self.scale, visible=visible, sink=sink))
            first += count
        return numpy.concatenate(rows)

    def ends(self):
        return numpy.cumsum(self.queries).tolist()

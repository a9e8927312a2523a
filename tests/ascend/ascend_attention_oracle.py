"""Attention in float64 from its definition: one query and one head at a time, nothing tiled.

numpy alone, and none of the routed operators' conventions: a query at position i of its request may
see the keys of the same request that the three questions in `_visible` admit.
"""

from __future__ import annotations

import numpy


def attention(
    query: numpy.ndarray,
    key: numpy.ndarray,
    value: numpy.ndarray,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks: numpy.ndarray | None = None,
) -> numpy.ndarray:
    """One request.

    Args:
        query: [Q, Hq, D], its last tokens.
        key: [K, Hkv, D], all of its tokens, K >= Q.
        value: [K, Hkv, D].
        scale: The factor of a product of query and key.
        causal: Whether a query sees no later key.
        window: How many keys a query sees before it, itself included; of a query that also sees
            later ones, as many on each side.
        sinks: [Hq], a logit that every query of a head has beside its keys, without a value.

    Returns:
        [Q, Hq, D] in float64.
    """
    query, key, value = (x.astype(numpy.float64) for x in (query, key, value))
    queries, heads, _ = query.shape
    result = numpy.zeros((queries, heads, value.shape[-1]))
    first = key.shape[0] - queries
    for at in range(queries):
        keys = [j for j in range(key.shape[0]) if _visible(first + at, j, causal, window)]
        for head in range(heads):
            shared = head * key.shape[1] // heads
            logits = key[keys, shared] @ query[at, head] * scale
            extra = [] if sinks is None else [float(sinks[head])]
            top = max([*logits, *extra])
            weights = numpy.exp(logits - top)
            total = weights.sum() + sum(numpy.exp(x - top) for x in extra)
            result[at, head] = weights @ value[keys, shared] / total
    return result


def _visible(i: int, j: int, causal: bool, window: int | None) -> bool:
    if causal and j > i:
        return False
    return window is None or abs(i - j) < window

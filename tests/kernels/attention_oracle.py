"""Attention a second time, densely and in fp64, from keys that no cache has held.

Nothing of ``ascend_patch`` is imported here.
"""

from __future__ import annotations

import numpy as np
import torch

# What rounding to nearest may move a value by, relative to it.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# float32 arithmetic on values of about 1: a score is a sum of up to 256 products.
_FLOAT32 = 1e-5


def one_request(query, keys, values, *, scale, causal, window=None, sinks=None) -> np.ndarray:
    """query [n, Hq, D], keys and values [s, Hk, D], of any dtype, to fp64 [n, Hq, D].

    The queries are the last n of s positions where ``causal`` or ``window`` make positions matter.
    ``window`` counts the query's own; without ``causal`` it reaches to both sides.
    """
    q, k, v = (x.double().numpy() for x in (query, keys, values))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    own = len(k) - len(q) + np.arange(len(q))
    distance = own[:, None] - np.arange(len(k))
    seen = np.ones(distance.shape, dtype=bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= np.abs(distance) < window
    weights = np.exp(np.einsum("ihd,jhd->hij", q, k) * scale) * seen
    total = weights.sum(-1)
    if sinks is not None:
        total = total + np.exp(sinks.double().numpy())[:, None]
    # A query that sees nothing gets zeros.
    weights = weights / np.where(total > 0, total, 1)[..., None]
    return np.einsum("hij,jhd->ihd", weights, v)


def is_close(got: torch.Tensor, want: np.ndarray) -> bool:
    """Is ``got`` the answer, computed in float32 and rounded once to its own dtype?"""
    found = got.double().numpy()
    allowed = np.abs(want) * _ROUNDING[got.dtype] * 1.001 + _FLOAT32
    return bool(np.isfinite(found).all() and (np.abs(found - want) <= allowed).all())

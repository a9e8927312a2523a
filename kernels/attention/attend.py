"""``attend``: make the call that a route names, and put its result where it belongs.

Only ``torch.ops.npu`` operators are called: torch_npu's, or those of the operator surface.
"""

from __future__ import annotations

from torch import Tensor

from ascend_patch.kernels.attention import calls, keys, masks, single
from ascend_patch.kernels.attention.batch import Batch
from ascend_patch.kernels.attention.calls import Heads
from ascend_patch.kernels.attention.case import HOST, NOTHING, Route
from ascend_patch.kernels.attention.masks import causal_mask

__all__ = ["Batch", "attend", "causal_mask"]


def attend(
    route: Route,
    batch: Batch,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    out: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    scale: float,
    sinks: Tensor | None = None,
) -> None:
    """Compute attention as ``route`` says and write rows 0 to ``batch.num_tokens`` of ``out``.

    Args:
        route: Of the step's case; not HOST.
        batch: The step's requests.
        query: [T, num_heads, head_size] or [T, num_heads * head_size]; T may be padded.
        key, value: This step's, [T, num_kv_heads, head_size]; read where the route's cache is none.
        key_cache, value_cache: [blocks, block size, num_kv_heads, head_size], this step's keys
            included; any strides, though what is not contiguous is copied. Read by other routes.
        out: [T, num_heads, head_size] or [T, num_heads * head_size]; rows of no request become 0.
        scale: Of the scores, before the softmax.
        sinks: [num_heads], a logit a head that takes part in the softmax and has no value.

    Raises:
        ValueError: The route is the host's, or does not fit what it is given.
    """
    if route.operator == HOST:
        raise ValueError(f"This case is not for attend. {route.reason}")
    end = batch.end
    rows = _first(out, batch.num_tokens, num_heads, head_size)
    if end < batch.num_tokens:
        rows[end:].zero_()
    if end == 0 or route.operator == NOTHING:
        rows[:end].zero_()
        return
    if query.shape[0] < end:
        raise ValueError(
            f"query has {query.shape[0]} rows, but the last request's queries end at {end}."
        )
    rows = _first(rows, end, num_heads, head_size)
    query = _first(query, end, num_heads, head_size).contiguous()
    mask = masks.of_step(batch, query.device) if route.mask == "causal" else None
    heads = Heads(num_heads, num_kv_heads, head_size, scale, sinks, mask)
    if route.cache == "none":
        key, value = _of_this_step(route, batch, key, value, heads)
        if route.per_request:
            single.of_this_step(route, batch, query, key, value, rows, heads)
        else:
            rows.copy_(calls.together(route, batch.whole, query, key, value, None, heads))
        return
    if key_cache is None or value_cache is None:
        raise ValueError(f"The route {route.row} reads the cache, but there is none.")
    if not any(batch.kv_lens):
        # No operator is given a cache of which nothing is read.
        rows.zero_()
        return
    if route.per_request:
        single.of_cache(route, batch, query, (key_cache, value_cache), rows, heads)
        return
    key, value, table = keys.paged((key_cache, value_cache), batch, tnd=True)
    parts = batch.parts(key.shape[0], key.shape[1])
    if len(parts) == 1:
        rows.copy_(calls.together(route, parts[0], query, key, value, table, heads))
        return
    for part in parts:
        own, table_rows = part.tokens, table[part.requests]
        rows[own].copy_(calls.together(route, part, query[own], key, value, table_rows, heads))


def _of_this_step(
    route: Route, batch: Batch, key: Tensor | None, value: Tensor | None, heads: Heads
) -> tuple[Tensor, Tensor]:
    """This step's keys and values of the requests alone: the operators want no row more."""
    if key is None or value is None:
        raise ValueError(f"The route {route.row} reads this step's keys, but there are none.")
    end = batch.end
    # Where a request has a context, these keys are not all of its keys: the defect that
    # embeddings had when their prefix was cached.
    if sum(batch.kv_lens) != end:
        raise ValueError(
            f"The route {route.row} reads this step's {end} keys, but the requests hold "
            f"{sum(batch.kv_lens)} tokens; with a context in the cache the state is not prefill."
        )
    shape = (end, heads.num_kv_heads, heads.head_size)
    return _first(key, *shape).contiguous(), _first(value, *shape).contiguous()


def _first(x: Tensor, count: int, heads: int, width: int) -> Tensor:
    """The first ``count`` rows of [T, heads, width] or [T, heads * width] as [count, heads, width].

    Each view costs the host a microsecond a layer, so there is none that changes nothing.
    """
    if x.shape[0] != count:
        x = x[:count]
    return x if x.dim() == 3 else x.view(count, heads, width)

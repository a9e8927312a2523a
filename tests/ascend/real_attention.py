"""kernels.attention's own calls under torch_npu's live schemas: a case of each state, against fp64.

Import it in an environment's process, after torch_npu.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401  its schemas are the ones that are called
from real_oracle import BLOCK, Paged, ratio, start

from ascend_patch.kernels.attention.attend import Batch, attend
from ascend_patch.kernels.attention.case import Case
from ascend_patch.kernels.attention.route import route
from ascend_patch.kernels.npu_ops import surface

operators = surface.install("2.13.0", record=True)
# contexts and queries of each state's requests
STATES = {
    "prefill": ([0, 0, 0], [5, 70, 1]),
    "cache_hit": ([128, 0, 256], [5, 70, 1]),
    "chunked": ([130, 0, 300], [5, 70, 1]),
    "decode": ([130, 7, 300], [1, 1, 1]),
    "speculative": ([130, 7, 300], [4, 4, 4]),
}


def attended(state: str, seed: int, *, causal: bool, window: int | None, kv_heads: int) -> float:
    """The largest error of one step, in units of what rounding may make."""
    start(seed)
    contexts, queries = STATES[state]
    batch = Paged(contexts, queries, kv_heads=kv_heads)
    case = Case(
        state, causal=causal, sliding_window=window, num_heads=4, num_kv_heads=kv_heads,
        max_query_len=max(queries), min_query_len=min(queries), max_seq_len=max(batch.lengths),
        batch=len(queries), block_size=BLOCK, torch_npu="2.13.0",
    )  # fmt: skip
    # This step's keys, as they are in the cache.
    fresh = [
        torch.cat(
            [
                torch.cat([cache[int(block)] for block in row])[length - count : length]
                for row, length, count in zip(batch.table, batch.lengths, queries, strict=True)
            ]
        )
        for cache in batch.caches
    ]
    out = torch.full_like(batch.query, torch.nan)
    attend(
        route(case), Batch(batch.ends(), batch.lengths, batch.table, sum(queries)), batch.query,
        *fresh, *batch.caches, out, num_heads=4, num_kv_heads=kv_heads, head_size=128,
        scale=batch.scale,
    )  # fmt: skip
    return ratio(out, batch.expected(causal=causal, window=window))


def measured(seed: int) -> tuple[dict[str, float], dict[str, int]]:
    """The largest error of each case, and how often each operator ran."""
    operators.calls.clear()
    found = {
        f"{state}, {'causal' if causal else 'all'}, window {window}, {kv_heads} kv heads": attended(
            state, seed, causal=causal, window=window, kv_heads=kv_heads
        )
        for state in STATES
        for causal in (True, False)
        for window in ((None, 33) if causal else (None,))
        for kv_heads in (1, 2, 4)
    }
    ran: dict[str, int] = {}
    for call in operators.calls:
        ran[call.operator] = ran.get(call.operator, 0) + 1
    return found, ran

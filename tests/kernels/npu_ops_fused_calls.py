"""How fused inference attention is called in tests, and judged by its definition."""

from __future__ import annotations

import itertools

import npu_ops_attention_oracle as oracle
import npu_ops_batches as batches
import numpy as np
import torch

V1, V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
NAMES = {
    V1: ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag"),
    V2: (
        "num_query_heads",
        "softmax_scale",
        "actual_seq_qlen",
        "actual_seq_kvlen",
        "return_softmax_lse",
    ),
}
MOST = 2**31 - 1


def lists(shape, made):
    """What a layout wants to be told about the lengths."""
    ends = list(itertools.accumulate(shape.query_lens))
    kv_ends = list(itertools.accumulate(shape.kv_lens))
    ragged = "T" in shape.layout
    kv = kv_ends if ragged and made.block_table is None else list(shape.kv_lens)
    return (ends if ragged else list(shape.query_lens)), kv


def call(operator, shape, made, **options):
    heads, scale, queries, keys, lse = NAMES[operator]
    query_lens, kv_lens = lists(shape, made)
    arguments = {
        heads: shape.heads,
        "num_key_value_heads": shape.kv_heads,
        scale: shape.width**-0.5,
        "input_layout": shape.layout,
        queries: query_lens,
        keys: kv_lens,
        lse: True,
        "block_table": made.block_table,
        "block_size": shape.block_size,
        **options,
    }
    return getattr(torch.ops.npu, operator)(made.query, made.key, made.value, **arguments)


def judge(shape, made, found, *, mode=0, pre=MOST, after=MOST, masks=None, sinks=None):
    """Every request of an answer and of its log-sum-exp, row by row."""
    out, lse = found
    assert out.dtype == made.query.dtype
    assert lse.dtype == torch.float32
    parts = batches.taken_apart(out, shape.query_lens, shape.layout.split("_")[-1], shape.heads)
    ragged = "T" in shape.layout
    sums = lse[..., 0].double() if ragged else lse[..., 0].double().transpose(1, 2)
    tokens = batches.taken_apart(
        sums[..., None], shape.query_lens, "TND" if ragged else "BSND", shape.heads
    )
    single = not ragged and max(shape.query_lens) <= 1
    for index, got in enumerate(parts):
        mask = masks[index] if masks is not None else None
        # One query in a layout that is not ragged: the modes are void, a full mask is not.
        asked = (0 if mask is None else 1) if single else mode
        unseen = oracle.hidden(
            shape.query_lens[index], shape.kv_lens[index], asked, pre, after, mask
        )
        expected, total = oracle.attention(
            made.queries[index],
            made.keys[index],
            made.values[index],
            shape.width**-0.5,
            unseen,
            sinks,
        )
        oracle.assert_close(got, expected, shape.dtype, f"request {index}")
        some = np.isfinite(total)
        np.testing.assert_allclose(tokens[index][some, 0], total[some], atol=2e-5)
        assert np.isinf(tokens[index][~some]).all()

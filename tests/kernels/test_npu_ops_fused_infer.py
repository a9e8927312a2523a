"""Fused inference attention on CPU tensors, against attention by its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import npu_ops_attention_oracle as oracle  # noqa: E402
import npu_ops_batches as batches  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from npu_ops_fused_calls import MOST, V1, V2, call, judge  # noqa: E402

LAYOUTS = ("TND", "NTD_TND", "BSH", "BSND", "BNSD", "BNSD_BSND")
quick = settings(
    max_examples=150,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


pytestmark = pytest.mark.usefixtures("on_the_surface")


@st.composite
def shapes(draw, layouts=LAYOUTS, dtypes=("float32", "bfloat16", "float16")):
    layout = draw(st.sampled_from(layouts))
    ragged = "T" in layout
    requests = draw(st.integers(1, 4))
    least = 0 if ragged else 1
    longest = draw(st.sampled_from((1, 3, 9, 20)))
    if layout == "BNSD_BSND":
        longest = max(longest, 3)
    query_lens = [draw(st.integers(least, longest)) for _ in range(requests)]
    if layout == "BNSD_BSND" and max(query_lens) == 1:
        query_lens[0] = 2
    kv_lens = [draw(st.integers(0, 45)) for _ in range(requests)]
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4)))
    widths = [(64, 64), (128, 128), (192, 128)] if ragged else [(16, 16), (64, 64), (128, 128)]
    if layout == "NTD_TND":
        widths = [(128, 128), (192, 128)]
    width, value_width = draw(st.sampled_from(widths))
    sizes = (0, 16, 32) if ragged or max(query_lens) == 1 else (0, 128)
    block_size = draw(st.sampled_from(sizes))
    may_be_first = block_size and layout in ("TND", "BNSD")
    return batches.Shape(
        tuple(query_lens),
        tuple(kv_lens),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=width,
        value_width=value_width,
        dtype=draw(st.sampled_from(dtypes)),
        layout=layout,
        block_size=block_size,
        heads_first=bool(may_be_first and draw(st.booleans())),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@quick
@given(shape=shapes(), mode=st.sampled_from((0, 2, 3, 4)), data=st.data())
def test_any_batch(shape, mode, data):
    """Ragged lengths, 0 and 1 among them, shared blocks, caches full of NaN, each mode."""
    pre, after = MOST, MOST
    if mode == 4:
        pre = data.draw(st.integers(-3, 30), label="pre_tokens")
        after = data.draw(st.integers(-pre if pre > 0 else abs(pre), 30), label="next_tokens")
    made = batches.make(shape)
    found = call(
        V1,
        shape,
        made,
        sparse_mode=mode,
        atten_mask=batches.MASK if mode else None,
        pre_tokens=pre,
        next_tokens=after,
    )
    judge(shape, made, found, mode=mode, pre=pre, after=after)


@quick
@given(
    shape=shapes(layouts=("TND",)),
    mode=st.sampled_from((0, 3, 4)),
    window=st.integers(1, 12),
    sink=st.booleans(),
)
def test_any_batch_of_the_second_version(shape, mode, window, sink):
    if shape.heads == shape.kv_heads:
        shape.heads_first = False
    made = batches.make(shape)
    rng = np.random.default_rng(shape.seed)
    sinks = rng.standard_normal(shape.heads).astype(np.float32) * 3 if sink else None
    after = 0 if mode == 4 else MOST
    pre = window - 1 if mode == 4 else MOST
    found = call(
        V2,
        shape,
        made,
        sparse_mode=mode,
        atten_mask=batches.MASK if mode else None,
        pre_tokens=pre,
        next_tokens=after,
        learnable_sink=None if sinks is None else torch.from_numpy(sinks),
    )
    if sinks is not None and any(
        oracle.hidden(q, k, mode, pre, after).all(1).any() or not k
        for q, k in zip(shape.query_lens, shape.kv_lens, strict=True)
    ):
        # Whether a row that sees nothing but its sink counts as one that sees nothing is not said.
        return
    judge(shape, made, found, mode=mode, pre=pre, after=after, sinks=sinks)


@quick
@given(
    shape=shapes(layouts=("BSH", "BSND", "BNSD", "BNSD_BSND")),
    mode=st.sampled_from((0, 1)),
    band=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    form=st.sampled_from((2, 3, 4, 5)),
    dtype=st.sampled_from((torch.bool, torch.int8, torch.uint8)),
)
def test_masks_in_full(shape, mode, band, form, dtype):
    """A mask for all requests, or one for each, larger than the lengths need."""
    made = batches.make(shape)
    requests, rows = len(shape.query_lens), max(shape.query_lens)
    columns = max(1, *shape.kv_lens)
    if shape.block_size:
        columns = made.block_table.shape[1] * shape.block_size
    rng = np.random.default_rng(shape.seed)
    single = rows == 1
    each = rng.random((requests, rows, columns)) < 0.4
    if form == 2 and single:
        given_mask, masks = each[:, 0], each
    elif form in (2, 3):
        given_mask, masks = each[0], [each[0]] * requests
        given_mask = given_mask if form == 2 else given_mask[None]
    elif form == 4:
        given_mask, masks = each[:, None], each
    else:
        given_mask, masks = each[:1, None], [each[0]] * requests
    mask = torch.from_numpy(given_mask).to(dtype).contiguous()
    found = call(
        V1,
        shape,
        made,
        sparse_mode=mode,
        atten_mask=mask,
        pre_tokens=band[0],
        next_tokens=band[1],
    )
    judge(shape, made, found, mode=mode, pre=band[0], after=band[1], masks=masks)

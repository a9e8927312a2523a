"""ATB's attention operators on CPU tensors, as op-plugin's own operator tests check them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import npu_ops_attention_oracle as oracle  # noqa: E402
import npu_ops_batches as batches  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from npu_ops_paged_calls import HIDES, caches, lens, upper  # noqa: E402

quick = settings(
    max_examples=80,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


pytestmark = pytest.mark.usefixtures("on_the_surface")


def nan_like(shape, made):
    out = made.query.new_empty(sum(shape.query_lens), shape.heads, shape.value_width)
    return out.fill_(float("nan"))


def judge(shape, made, out, causal=True):
    for index, got in enumerate(batches.taken_apart(out, shape.query_lens, "TND", shape.heads)):
        rows, columns = shape.query_lens[index], shape.kv_lens[index]
        expected, _ = oracle.attention(
            made.queries[index],
            made.keys[index],
            made.values[index],
            shape.width**-0.5,
            oracle.hidden(rows, columns, 3 if causal else 0, 0, 0),
        )
        oracle.assert_close(got, expected, shape.dtype, f"request {index}")


@st.composite
def shapes(draw, decode=False, cached=True):
    count = draw(st.integers(1, 5))
    rows = [1 if decode else draw(st.integers(0, 12)) for _ in range(count)]
    columns = [n + draw(st.integers(0, 40)) if cached else n for n in rows]
    if decode:
        columns = [n - draw(st.integers(0, 1)) for n in columns]
    kv_heads, group = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    width, value_width = draw(st.sampled_from(((128, 128), (64, 64), (288, 96), (40, 8))))
    return batches.Shape(
        tuple(rows),
        tuple(columns),
        kv_heads * group,
        kv_heads,
        width,
        value_width,
        dtype=draw(st.sampled_from(tuple(HIDES))),
        block_size=draw(st.sampled_from((16, 128))) if cached else 0,
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@quick
@given(shape=shapes(decode=True))
def test_decode(shape):
    """A context may be empty; what lies behind it in the block table and the cache is not read."""
    made = batches.make(shape)
    out = nan_like(shape, made)
    found = torch.ops.atb._npu_paged_attention(
        made.query,
        *caches(made, shape),
        shape.kv_heads,
        shape.heads,
        shape.width**-0.5,
        made.block_table,
        lens(shape.kv_lens),
        out,
    )
    assert found is None
    judge(shape, made, out, causal=False)


@quick
@given(shape=shapes())
def test_prefill_over_a_cache(shape):
    made = batches.make(shape)
    out = nan_like(shape, made)
    torch.ops.atb._npu_flash_attention_qlens(
        made.query,
        *caches(made, shape),
        made.block_table,
        upper(128, shape.dtype),
        lens(shape.query_lens),
        lens(shape.kv_lens),
        shape.kv_heads,
        shape.heads,
        shape.width**-0.5,
        out,
    )
    judge(shape, made, out)


@quick
@given(shape=shapes(cached=False), masked=st.booleans())
def test_prefill(shape, masked):
    made = batches.make(shape)
    out = nan_like(shape, made)
    rest = (lens(shape.query_lens), shape.width**-0.5, shape.heads, shape.kv_heads, out)
    if masked:
        mask = upper(max(shape.query_lens) + 3, shape.dtype)
        torch.ops.atb._npu_flash_attention(made.query, made.key, made.value, mask, *rest)
    else:
        torch.ops.atb._npu_flash_attention_unpad(made.query, made.key, made.value, *rest)
    judge(shape, made, out, causal=masked)


def test_a_float16_mask_is_added(seed):
    """Not only -inf: op-plugin's test adds -10000, and a slope would be added too."""
    shape = batches.Shape((6,), (6,), dtype="float16", width=64, seed=seed)
    made = batches.make(shape)
    bias = batches.numbers(np.random.default_rng(seed), 6, 6, dtype="float16")
    out = nan_like(shape, made)
    rest = (lens([6]), 64**-0.5, 4, 2, out)
    torch.ops.atb._npu_flash_attention(made.query, made.key, made.value, bias, *rest)
    for head in range(4):
        q, k, v = made.queries[0][:, head], made.keys[0][:, head // 2], made.values[0][:, head // 2]
        scores = q @ k.T * 64**-0.5 + batches.plain(bias)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ v
        oracle.assert_close(batches.plain(out)[:, head], expected, "float16")


def test_tokens_of_no_request_are_left(seed):
    shape = batches.Shape((3, 2), (3, 2), dtype="bfloat16", seed=seed)
    made = batches.make(shape)
    out = torch.full((5, 4, 128), 7.0, dtype=torch.bfloat16)
    rest = (lens([2, 1]), 128**-0.5, 4, 2, out)
    mask = upper(3, "bfloat16")
    torch.ops.atb._npu_flash_attention(made.query, made.key, made.value, mask, *rest)
    assert (out[3:] == 7).all()
    assert not (out[:3] == 7).any()

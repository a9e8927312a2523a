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
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops import paged, surface  # noqa: E402

HIDES = {"float16": float("-inf"), "bfloat16": 1.0, "float32": 1.0}
quick = settings(
    max_examples=80,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def on_the_surface():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    surface.install()
    with surface.settings(allow=("float32",)):
        yield
    torch.set_num_threads(threads)


def upper(side, dtype):
    """The mask that hosts and tests give: what hides a column above the diagonal, 0 elsewhere."""
    hidden = torch.triu(torch.ones(side, side, dtype=torch.bool), 1)
    return torch.zeros(side, side, dtype=getattr(torch, dtype)).masked_fill(hidden, HIDES[dtype])


def lens(values):
    return torch.tensor(values, dtype=torch.int32)


def caches(made, shape):
    """[blocks, block_size, H] as ATB wants it: heads apart."""
    return [x.unflatten(2, (shape.kv_heads, -1)) for x in (made.key, made.value)]


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


def test_the_workspace(seed):
    call = decode()
    arguments = {name: value for name, value in call.items() if name != "out"}
    workspace = torch.ops.atb._npu_paged_attention_get_workspace(**arguments, out=call["out"])
    before = call["out"].clone()
    torch.ops.atb._npu_paged_attention(**call, workspace=workspace)
    assert not torch.equal(call["out"], before)


def decode(heads=4, kv_heads=2, width=64, **options):
    shape = batches.Shape((1, 1), (40, 7), heads, kv_heads, width, 0, "bfloat16", block_size=16)
    made = batches.make(shape)
    key, value = caches(made, shape)
    return {
        "query": made.query,
        "key_cache": key,
        "value_cache": value,
        "num_kv_heads": kv_heads,
        "num_heads": heads,
        "scale_value": width**-0.5,
        "block_table": made.block_table,
        "context_lens": lens([40, 7]),
        "out": torch.zeros_like(made.query),
        **options,
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"query": lambda x: x.double()}, "query is torch.float64; it must be float16 or bfloat16"),
        ({"query": lambda x: x.flatten(1)}, r"query has shape .* must be \(tokens, 4, D\)"),
        ({"num_heads": 3}, r"must be \(tokens, 3, D\)"),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"num_kv_heads": 1}, r"key_cache has shape .* \(blocks, block_size, 1, D\)"),
        ({"key_cache": lambda x: x.half()}, "key_cache is torch.float16; it must be torch.bf"),
        ({"value_cache": lambda x: x.flatten(2)}, "value_cache has shape"),
        ({"value_cache": lambda x: x[:3]}, "they must have the same blocks"),
        ({"key_cache": lambda x: x[..., :32]}, "key_cache has head size 32 and query 64"),
        ({"context_lens": lambda x: x.long()}, "context_lens is torch.int64 .* must be int32"),
        ({"context_lens": lens([40, -1])}, "context_lens has -1; a length must not be negative"),
        ({"context_lens": lens([40, 7, 1])}, "context_lens has 3 entries for 2 requests"),
        ({"context_lens": lens([81, 7])}, "block_table has 5 entries a request; .* needs 6"),
        ({"block_table": lambda x: x.long()}, "block_table is torch.int64"),
        ({"block_table": lambda x: x[:1]}, "block_table has 1 entries for 2 requests"),
        ({"block_table": lambda x: x.clone().fill_(9)}, r"block_table has 9 at \(0, 0\)"),
        ({"out": lambda x: x.float()}, "out is torch.float32; it must be torch.bfloat16"),
        ({"out": lambda x: torch.cat((x, x), -1)[..., :64]}, "out is not contiguous"),
        ({"out": lambda x: x[:1]}, r"out has shape \(1, 4, 64\); it must be \(2, 4, 64\)"),
    ],
)  # fmt: skip
def test_limits_of_decode(changes, sentence):
    call = decode()
    assert_refused(paged._npu_paged_attention, call, changes, sentence)


@pytest.mark.parametrize(
    ("width", "size", "fits"),
    [(256, 256, True), (264, 128, True), (264, 144, False), (576, 128, True), (584, 16, False),
     (64, 24, False)],
)  # fmt: skip
def test_head_sizes_and_blocks_of_decode(width, size, fits):
    shape = batches.Shape((1,), (30,), 2, 1, width, 0, "bfloat16", block_size=size)
    made = batches.make(shape)
    key, value = caches(made, shape)
    changed = {
        "query": made.query,
        "key_cache": key,
        "value_cache": value,
        "block_table": made.block_table,
        "out": torch.zeros_like(made.query),
        "context_lens": lens([30]),
        "num_heads": 2,
        "num_kv_heads": 1,
    }
    if fits:
        paged._npu_paged_attention(**{**decode(), **changed})
        return
    said = f"in blocks of {size} tokens" if size % 16 == 0 else f"has blocks of {size} tokens"
    assert_refused(paged._npu_paged_attention, decode(), changed, said)


def qlens():
    shape = batches.Shape((3, 2), (20, 2), 4, 2, 64, 0, "bfloat16", block_size=16)
    made = batches.make(shape)
    key, value = caches(made, shape)
    return {
        "query": made.query,
        "key_cache": key,
        "value_cache": value,
        "block_table": made.block_table,
        "mask": upper(128, "bfloat16"),
        "seq_len": lens([3, 2]),
        "context_lens": lens([20, 2]),
        "num_kv_heads": 2,
        "num_heads": 4,
        "scale_value": 0.125,
        "out": torch.zeros_like(made.query),
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask": upper(2048, "bfloat16")}, r"it must be the compressed one of \(128, 128\)"),
        ({"mask": upper(128, "float16")}, "mask is torch.float16; it must be torch.bfloat16"),
        ({"mask": lambda x: x.t().contiguous()}, "mask is not the plain causal one"),
        ({"seq_len": lens([3, 3])}, "seq_len adds up to 6; query has only 5 tokens"),
        ({"seq_len": lens([3])}, "context_lens has 2 entries for 1 requests"),
        ({"context_lens": lens([20, 1])}, "context_lens has 1 at place 1, where seq_len has 2"),
    ],
)
def test_limits_of_prefill_over_a_cache(changes, sentence):
    assert_refused(paged._npu_flash_attention_qlens, qlens(), changes, sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask": upper(2, "bfloat16")}, r"mask has shape \(2, 2\); .* needs \(3, 3\)"),
        ({"mask": upper(3, "float16")}, "mask is torch.float16; it must be torch.bfloat16"),
        ({"key": lambda x: x[:4]}, r"key has shape .* it must be \(5, 2, D\)"),
        ({"value": lambda x: x.half()}, "value is torch.float16; it must be torch.bfloat16"),
        ({"key": lambda x: x[..., :32]}, "key has head size 32 and query 64"),
        ({"seq_len": lens([3, 3])}, "seq_len adds up to 6"),
    ],
)
def test_limits_of_prefill(changes, sentence):
    shape = batches.Shape((3, 2), (3, 2), 4, 2, 64, 0, "bfloat16")
    made = batches.make(shape)
    call = {
        "query": made.query,
        "key": made.key,
        "value": made.value,
        "mask": upper(3, "bfloat16"),
        "seq_len": lens([3, 2]),
        "scale_value": 0.125,
        "num_heads": 4,
        "num_kv_heads": 2,
        "out": torch.zeros_like(made.query),
    }
    assert_refused(paged._npu_flash_attention, call, changes, sentence)
    if "mask" not in changes:
        del call["mask"]
        assert_refused(paged._npu_flash_attention_unpad, call, changes, sentence)

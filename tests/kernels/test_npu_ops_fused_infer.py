"""Fused inference attention on CPU tensors, against attention by its definition in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import npu_ops_attention_oracle as oracle  # noqa: E402
import npu_ops_batches as batches  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels.npu_ops import surface  # noqa: E402

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
LAYOUTS = ("TND", "NTD_TND", "BSH", "BSND", "BNSD", "BNSD_BSND")
MOST = 2**31 - 1
quick = settings(
    max_examples=150,
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


@pytest.mark.parametrize("operator", [V1, V2])
def test_a_window_counts_the_querys_own_token(operator):
    """vLLM's window of W tokens is pre_tokens = W - 1, in decode too; W off by one is seen."""
    shape = batches.Shape((1, 4), (30, 20), layout="TND", block_size=16, seed=5)
    made = batches.make(shape)
    found = call(
        operator, shape, made, sparse_mode=4, atten_mask=batches.MASK, pre_tokens=7, next_tokens=0
    )
    for index, got in enumerate(batches.taken_apart(found[0], shape.query_lens, "TND", 4)):
        positions = np.arange(shape.kv_lens[index])
        rows = positions[-shape.query_lens[index] :, None]
        unseen = (positions > rows) | (positions <= rows - 8)
        expected, _ = oracle.attention(
            made.queries[index], made.keys[index], made.values[index], 128**-0.5, unseen
        )
        oracle.assert_close(got, expected, "float32")
    with pytest.raises(AssertionError, match="are wrong"):
        judge(shape, made, found, mode=4, pre=8, after=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["BSH", "BSND", "TND"])
def test_decode_ignores_the_window_outside_tnd(layout, dtype):
    """What vllm-ascend's decode with a sliding window relies on and does not get."""
    shape = batches.Shape(
        (1, 1), (40, 33), layout=layout, block_size=16, dtype=dtype, width=64, seed=3
    )
    made = batches.make(shape)
    options = {"sparse_mode": 4, "atten_mask": batches.MASK, "pre_tokens": 3, "next_tokens": 0}
    windowed = call(V1, shape, made, **options)
    full = call(V1, shape, made)
    assert torch.equal(windowed[0], full[0]) == (layout != "TND")


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("form", ["1N1D", "1ND", "1H", "1"])
def test_int8_keys_as_decode_reads_them(form, offsets, seed):
    """Per channel, (x + offset) * scale, over a paged cache, as vllm-ascend's C8 calls it."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, width, size, lens = 8, 2, 64, 32, (70, 1, 33)
    blocks = 7
    caches = rng.integers(-128, 128, (2, blocks, size, kv_heads, width)).astype(np.int8)
    query = batches.numbers(rng, len(lens), heads, 1, width, dtype="bfloat16")
    table = np.full((len(lens), 5), -7, np.int32)
    table[0, :3], table[1, :1], table[2, :2] = (4, 0, 2), (6,), (1, 3)
    count = (kv_heads, width) if form != "1" else ()
    numbers = [
        torch.from_numpy(x.astype(np.float32)).bfloat16()
        for x in (
            rng.random((2, *count)) * 0.02 + 0.001,
            rng.integers(-20, 20, (2, *count)),
        )
    ]
    shapes_ = {"1N1D": (1, kv_heads, 1, width), "1ND": (1, kv_heads, width), "1H": (1, -1)}
    shaped = [[x.reshape(shapes_.get(form, (1,))) for x in pair] for pair in numbers]
    (key_scale, value_scale), (key_offset, value_offset) = shaped
    options = {"key_antiquant_offset": key_offset, "value_antiquant_offset": value_offset}
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query,
        *(torch.from_numpy(x.reshape(blocks, size, -1)) for x in caches),
        key_antiquant_scale=key_scale,
        value_antiquant_scale=value_scale,
        **(options if offsets else {}),
        block_table=torch.from_numpy(table),
        actual_seq_lengths_kv=list(lens),
        num_heads=heads,
        num_key_value_heads=kv_heads,
        input_layout="BNSD",
        scale=width**-0.5,
        block_size=size,
    )
    scales, added = (batches.plain(x) for x in numbers)
    for index, length in enumerate(lens):
        key, value = (
            np.concatenate([cache[b] for b in table[index] if b >= 0])[:length] for cache in caches
        )
        key, value = (
            (x.astype(np.float64) + (added[i] if offsets else 0)) * scales[i]
            for i, x in enumerate((key, value))
        )
        expected, _ = oracle.attention(
            batches.plain(query[index]).transpose(1, 0, 2),
            key,
            value,
            width**-0.5,
            np.zeros((1, length), bool),
        )
        oracle.assert_close(batches.plain(out[index]).transpose(1, 0, 2), expected, "bfloat16")


@pytest.mark.parametrize("operator", [V1, V2])
@pytest.mark.parametrize("lse", [False, True])
def test_the_out_variant_writes_what_it_is_given(operator, lse, poison):
    """Also where softmax_lse is a stub of one number, as vllm-ascend passes it."""
    shape = batches.Shape((2, 3), (5, 9), layout="TND", block_size=16, dtype="bfloat16", seed=9)
    made = batches.make(shape)
    names = NAMES[operator]
    options = {"sparse_mode": 3, "atten_mask": batches.MASK, names[4]: lse}
    expected = call(operator, shape, made, **options)
    out = torch.empty_like(expected[0])
    stub = torch.empty(5, 4, 1) if lse else torch.empty(1, dtype=torch.bfloat16)
    query_lens, kv_lens = lists(shape, made)
    arguments = {
        names[0]: 4,
        "num_key_value_heads": 2,
        names[1]: 128**-0.5,
        "input_layout": "TND",
        names[2]: query_lens,
        names[3]: kv_lens,
        "block_table": made.block_table,
        "block_size": 16,
        **options,
    }
    tensors = (made.query, made.key, made.value)
    query = "_" + operator + "_get_max_workspace"
    workspace = getattr(torch.ops.npu, query)(*tensors, **arguments)
    assert workspace.numel()
    returned = getattr(torch.ops.npu, operator).out(
        *tensors, **arguments, workspace=workspace, out=[out, stub]
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(stub.float(), expected[1])
    assert returned[0].data_ptr() == out.data_ptr()


def test_nothing_in_nothing_out():
    """Documented: an empty query gives an empty answer, empty keys give zeros."""
    empty = torch.empty(0, 4, 128)
    key = torch.empty(3, 2, 128)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        empty, key, key, num_heads=4, num_key_value_heads=2, input_layout="TND"
    )
    assert out.shape == (0, 4, 128)
    keys = torch.empty(0, 2, 128)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        torch.randn(3, 4, 128),
        keys,
        keys,
        num_heads=4,
        num_key_value_heads=2,
        input_layout="TND",
        actual_seq_lengths=[3],
        actual_seq_lengths_kv=[0],
    )
    assert torch.equal(out, torch.zeros(3, 4, 128))


def test_lists_may_be_tensors():
    """vllm-ascend passes seq_lens as it is, an int32 tensor."""
    shape = batches.Shape((1, 1), (20, 9), layout="BSH", block_size=16, dtype="bfloat16", seed=1)
    made = batches.make(shape)
    found = call(V1, shape, made, actual_seq_lengths_kv=torch.tensor([20, 9], dtype=torch.int32))
    judge(shape, made, found)


@pytest.mark.parametrize("length", [1, 2])
def test_a_list_of_one_is_for_all(length):
    shape = batches.Shape((3, 3), (7, 7), layout="BSND", seed=2)
    made = batches.make(shape)
    found = call(
        V1, shape, made, actual_seq_lengths=[3] * length, actual_seq_lengths_kv=[7] * length
    )
    judge(shape, made, found)


def test_without_lists_every_token_counts():
    shape = batches.Shape((3, 3), (7, 7), layout="BNSD", seed=4)
    made = batches.make(shape)
    found = call(V1, shape, made, actual_seq_lengths=None, actual_seq_lengths_kv=None)
    judge(shape, made, found)


def test_many_queries_are_worked_off_in_parts(monkeypatch):
    from ascend_patch.kernels.npu_ops import softmax

    monkeypatch.setattr(softmax, "_MOST_SCORES", 64)
    shape = batches.Shape((19, 5), (30, 45), heads=6, layout="TND", block_size=16, seed=8)
    made = batches.make(shape)
    found = call(V1, shape, made, sparse_mode=3, atten_mask=batches.MASK)
    judge(shape, made, found, mode=3)

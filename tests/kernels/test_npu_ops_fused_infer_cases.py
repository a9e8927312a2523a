"""Fused inference attention: decode, int8 keys, the ``.out`` variant, and what the lists may be."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import npu_ops_attention_oracle as oracle  # noqa: E402
import npu_ops_batches as batches  # noqa: E402
from npu_ops_fused_calls import NAMES, V1, V2, call, judge, lists  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_the_surface")


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
    with pytest.raises(RuntimeError, match=f"^{operator}: .*=7 is no multiple of"):
        getattr(torch.ops.npu, query)(*tensors, **{**arguments, names[0]: 7})
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

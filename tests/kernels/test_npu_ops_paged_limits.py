"""What ATB's attention operators ask of their arguments, one change at a time."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import npu_ops_batches as batches  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402
from npu_ops_paged_calls import caches, lens, upper  # noqa: E402

from ascend_patch.kernels.npu_ops import paged  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_the_surface")


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


def test_the_workspace(seed):
    call = decode()
    arguments = {name: value for name, value in call.items() if name != "out"}
    workspace = torch.ops.atb._npu_paged_attention_get_workspace(**arguments, out=call["out"])
    with pytest.raises(RuntimeError, match=r"^_npu_paged_attention: num_heads=4 is no multiple"):
        torch.ops.atb._npu_paged_attention_get_workspace(**{**call, "num_kv_heads": 3})
    before = call["out"].clone()
    torch.ops.atb._npu_paged_attention(**call, workspace=workspace)
    assert not torch.equal(call["out"], before)

"""Each limit of fused inference attention: a call that is taken, one change, and what is said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_fused_taken import BF16, RENAMED, dense, paged, second  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score as v1,
)
from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score_v2 as v2,
)
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402


def test_dtypes():
    assert_refused(v1, dense(), {"query": lambda x: x.float()}, "query is torch.float32")
    assert_refused(v1, dense(), {"key": lambda x: x.half()}, "value is .*bfloat16 and key is")
    change = {"key": lambda x: x.half(), "value": lambda x: x.half()}
    assert_refused(v1, dense(), change, "key is torch.float16; it must be torch.bfloat16")
    change = {name: lambda x: x.float() for name in ("query", "key", "value")}
    assert_refused(v1, dense(), change, "it must be float16 or bfloat16")
    call = {**dense(), **{name: dense()[name].float() for name in ("query", "key", "value")}}
    with settings(allow=("float32",)):
        assert v1(**call)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["SBH", "BSH_NBSD", "TND_NTD", "NTD"])
def test_layouts_that_are_not_there(layout):
    assert_refused(v1, dense(), {"input_layout": layout}, "is not emulated; use one of BSH")


@pytest.mark.parametrize(
    ("layout", "changed", "sentence"),
    [
        ("TND", {"query": lambda x: x[None]}, r"query has shape .* needs \(T, N, D\)"),
        ("BSND", {"key": lambda x: x.flatten(2)}, r"key has shape .* needs \(B, S, N, D\)"),
        ("BNSD", {"value": lambda x: x.flatten(0, 1)}, r"value has shape"),
        ("TND", {"value": lambda x: x[:, :1]}, "value has 1 heads; num_key_value_heads says 2"),
        ("TND", {"num_heads": 4, "num_key_value_heads": 2}, "query has 8 heads; num_heads says 4"),
        ("TND", {"num_key_value_heads": 4}, "key has 2 heads; num_key_value_heads says 4"),
        ("BSND", {"value": lambda x: x[:, :3]}, "value has shape .* they must be the same"),
        ("BSH", {"num_heads": 6, "num_key_value_heads": 2}, "query has H=1024, no multiple of"),
        ("BSND", {"key": lambda x: x[:1], "value": lambda x: x[:1]}, "key has a batch of 1"),
        ("TND", {"key": lambda x: x[..., :64].contiguous()}, "key has head size 64 and query 128"),
    ],
)
def test_shapes(layout, changed, sentence):
    assert_refused(v1, dense(layout), changed, sentence)


def test_numbers_of_heads():
    for name in ("num_heads", "num_key_value_heads"):
        assert_refused(v1, dense(), {name: 257}, rf"{name}=257; it must be 1..256")
    assert_refused(v1, dense(), {"num_key_value_heads": 3}, "=8 is no multiple of .*=3")
    many = dense(heads=64, kv_heads=1, rows=1, columns=1)
    more = dense(heads=65, kv_heads=1, rows=1, columns=1)
    assert_refused(v1, many, more, "is 65 times num_key_value_heads=1")
    assert_refused(v2, second(many), second(more), "num_query_heads=65 is 65 times")


def test_zero_key_value_heads_are_as_many_as_the_query_has():
    call = dense(kv_heads=8)
    expected = v1(**call)[0]
    assert torch.equal(v1(**{**call, "num_key_value_heads": 0})[0], expected)


@pytest.mark.parametrize("width", [8, 32, 48, 96, 112, 160, 512])
def test_head_sizes_of_tnd(width):
    changed = dense(width=width)
    changed = {name: changed[name] for name in ("query", "key", "value")}
    assert_refused(v1, dense(), changed, rf"head size {width} .* in TND; it must be 128, 192")


def test_head_sizes_that_are_in_use():
    """64 and 256 are an allowance; the second version documents 64 where heads are not grouped."""
    for width in (64, 256):
        call = dense(width=width)
        v1(**call)
        assert_refused(v1, call, {}, f"head size {width}", strict=True)
        assert_refused(v1, call, {}, f"head size {width}", forbid=("tnd_head_size",))
        with settings(strict=True, allow=("tnd_head_size",)):
            v1(**call)
    with settings(strict=True):
        v1(**dense(width=128))
        v1(**dense(width=192))
        v2(**second(dense(width=64, kv_heads=8)))
    assert_refused(v2, second(dense(width=64)), {}, "head size 64", strict=True)


def test_what_192_takes():
    call = dense(width=192, kv_heads=8)
    narrow = {"value": lambda x: x[..., :128].contiguous()}
    v1(**{**call, "value": call["value"][..., :128].contiguous()})
    band = {"sparse_mode": 4, "next_tokens": 0, "pre_tokens": 3}
    assert_refused(v1, call, band, "sparse_mode=4 with values of head size 192")
    v1(**{**call, **band, "value": narrow["value"](call["value"])})
    ntd = dense("NTD_TND", width=192)
    ntd["value"] = ntd["value"][..., :128].contiguous()
    assert_refused(v1, ntd, dense("NTD_TND", width=192), "head size 192 with values of 192")
    assert_refused(v2, second(call), second(dense(width=192)), "head size 192 with values of 192")


def test_what_256_takes():
    """CANN has one path for it in TND: grouped queries, modes 0 and 3, blocks of 128."""
    call = dense(width=256)
    assert_refused(v1, call, dense(width=256, kv_heads=8), "as many key/value heads as query")
    assert_refused(v1, call, {"sparse_mode": 4, "next_tokens": 0}, "sparse_mode=4 with values of")
    assert_refused(v1, call, {"sparse_mode": 2}, "head size 256 .* sparse_mode=2")
    assert_refused(v1, call, {"inner_precise": 1}, "head size 256 .* inner_precise=1")
    sinks = {"learnable_sink": torch.zeros(8, dtype=BF16)}
    assert_refused(v2, second(call), sinks, "head size 256 .* learnable_sink")
    cached = paged(width=256)
    assert_refused(v1, cached, paged(width=256, size=64), r"it takes \(blocks, 128, KV_N \* D\)")
    changed = paged(width=256, heads_first=True)
    assert_refused(v1, cached, changed, r"it takes \(blocks, 128, KV_N \* D\)")


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
def test_head_sizes_of_other_layouts(layout):
    call = dense(layout)
    assert_refused(v1, call, dense(layout, width=520), "the head size is 520; it may be 512")
    assert_refused(v1, call, dense(layout, width=20), "the head size is 20; .* multiple of 8")
    v1(**dense(layout, width=24))
    changed = second(dense(layout, width=24))
    assert_refused(v2, second(call), changed, "the head size is 24; .* multiple of 16")


def test_batches_with_head_sizes_off_32_bytes():
    call = dense("BNSD", width=24, heads=1, kv_heads=1, rows=2, columns=2)
    for name in ("query", "key", "value"):
        call[name] = call[name].repeat(64, 1, 1, 1)
    call["actual_seq_lengths"] = call["actual_seq_lengths_kv"] = [2]
    more = {name: lambda x: torch.cat((x, x[:1])) for name in ("query", "key", "value")}
    assert_refused(v1, call, more, "the batch is 129; with head size 24")


def test_longest_decode():
    query = torch.ones(1, 1, 1, 16, dtype=BF16)
    key = torch.ones(1, 1, 1, 16, dtype=BF16).expand(1, 1, 262145, 16)
    call = {"query": query, "key": key[:, :, :9], "value": key[:, :, :9], "input_layout": "BNSD"}
    changed = {"key": key, "value": key}
    assert_refused(v1, call, changed, "KV_S is 262145; with Q_S = 1 it may be 262144")


def test_one_query_has_no_bnsd_bsnd():
    call = dense("BNSD_BSND", sparse_mode=0, atten_mask=None)
    changed = dense("BNSD_BSND", rows=1, sparse_mode=0, atten_mask=None)
    assert_refused(v1, call, changed, "'BNSD_BSND' needs Q_S > 1")


@pytest.mark.parametrize("name", ["actual_seq_lengths", "actual_seq_lengths_kv"])
def test_lists_of_tnd(name):
    v2_name = RENAMED[name]
    assert_refused(v1, dense(), {name: None}, f"{name} is missing; input_layout='TND' needs it")
    assert_refused(v2, second(dense()), {v2_name: None}, f"{v2_name} is missing")
    many = [0] * 4095 + [12, 12]
    assert_refused(v1, dense(), {name: many}, f"{name} has 4097 entries; TND takes 4096")
    assert_refused(v1, dense(), {name: [13, 12]}, f"{name} has 12 at place 1 after 13")
    assert_refused(v1, dense(), {name: [-1, 12]}, f"{name} has -1 at place 0")
    for lens, rest in (([6, 11], "ends with 11"), ([6, 13], "ends with 13")):
        assert_refused(v1, dense(), {name: lens}, f"{name} {rest} and .* 12 tokens")


def test_padded_requests():
    """Error 561002 of an NPU: a dummy request in one list and not in the other."""
    assert_refused(
        v1,
        dense(),
        {"actual_seq_lengths": [6, 12, 12]},
        "actual_seq_lengths_kv has 2 entries for a batch of 3",
    )
    call = paged()
    changed = {"actual_seq_lengths_kv": [200, 100, 1]}
    assert_refused(v1, call, changed, "actual_seq_lengths_kv has 3 entries for a batch of 2")
    changed = {"actual_seq_lengths_kv": [200, -1]}
    assert_refused(v1, call, changed, "has -1 at place 1; with a block table")


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("name", ["actual_seq_lengths", "actual_seq_lengths_kv"])
def test_lists_of_other_layouts(layout, name):
    call = dense(layout)
    assert_refused(v1, call, {name: [6, 7]}, rf"{name} has 7 at place 1; .* between 0 and the")
    assert_refused(v1, call, {name: [-1]}, f"{name} has -1 at place 0")
    three = {key: torch.cat((call[key], call[key][:1])) for key in ("query", "key", "value")}
    changed = {**three, name: [6, 6], "actual_seq_lengths_kv": [6]}
    if name == "actual_seq_lengths_kv":
        changed = {**three, "actual_seq_lengths": [6], name: [6, 6]}
    assert_refused(v1, call, changed, f"{name} has 2 entries for a batch of 3")
    # More than there are requests, and the first count.
    v1(**{**call, name: [6, 6, 99]})


def test_float16_in_tnd():
    """CANN 8.5 documents bfloat16 alone."""
    half = {name: lambda x: x.half() for name in ("query", "key", "value")}
    said = "query is torch.float16 in TND; it must be bfloat16"
    assert_refused(v1, dense(), half, said, strict=True)
    assert_refused(v1, dense(), half, said, forbid=("tnd_float16",))
    call = {name: x.half() if name in half else x for name, x in dense().items()}
    v1(**call)
    with settings(strict=True, cann="9.0"):
        v1(**call)

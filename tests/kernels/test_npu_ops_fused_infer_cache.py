"""Limits of fused inference attention on paged caches, and of strides."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_batches import MASK  # noqa: E402
from npu_ops_fused_taken import dense, paged, second, strided  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score as v1,
)
from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score_v2 as v2,
)
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402


def test_the_block_table():
    call = paged()
    assert_refused(v1, call, {"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is missing")
    assert_refused(v1, call, {"block_table": lambda x: x.long()}, "block_table is torch.int64")
    assert_refused(v1, call, {"block_table": lambda x: x[0]}, r"block_table has shape \(3,\)")
    change = {"block_table": lambda x: torch.cat((x, x))}
    assert_refused(v1, call, change, "block_table has 4 rows for a batch of 2")
    assert_refused(v1, call, {"block_table": lambda x: x[:, :1]}, "1 entries a request; .* needs 2")
    for entry in (8, -1, 2**31 - 1):
        table = call["block_table"].clone()
        table[0, 1] = entry
        assert_refused(v1, call, {"block_table": table}, rf"has {entry} at \(0, 1\); .* 0\.\.7")
    # The same beyond the length is no matter.
    table = call["block_table"].clone()
    table[:, 2] = 99
    assert torch.equal(v1(**{**call, "block_table": table})[0], v1(**call)[0])


def test_a_block_table_is_missing_its_lengths_elsewhere():
    call = paged("BSND", atten_mask=None, sparse_mode=0)
    assert_refused(v1, call, {"actual_seq_lengths_kv": None}, "is missing; a block table needs it")


@pytest.mark.parametrize(
    ("layout", "rows", "fits", "wrong", "said"),
    [
        ("TND", 6, (16, 48, 128, 1024), (8, 24, 1040), "a multiple of 16 up to 1024 in TND"),
        ("BSND", 6, (128, 256, 384, 512), (16, 64, 192, 640), "128, 256, 384 or 512 with Q_S > 1"),
        ("BSND", 1, (16, 64, 128, 512), (8, 24, 528), "a multiple of 16 up to 512 with Q_S = 1"),
    ],
)
def test_block_sizes(layout, rows, fits, wrong, said):
    options = {"rows": rows, "blocks": 30, "atten_mask": None, "sparse_mode": 0}
    for size in fits:
        v1(**paged(layout, size=size, **options))
    for size in wrong:
        changed = paged(layout, size=size, **options)
        assert_refused(
            v1, paged(layout, size=128, **options), changed, f"block_size={size}; .*{said}"
        )
    for size in (0, -128):
        call = paged(layout, **options)
        assert_refused(v1, call, {"block_size": size}, f"block_size={size}")


def test_the_shape_of_a_cache():
    call = paged()
    for name in ("key", "value"):
        assert_refused(
            v1, call, {name: lambda x: x[0]}, rf"the cache {name} has shape \(128, 256\)"
        )
    assert_refused(v1, call, {"block_size": 64}, "has blocks of 128 tokens; block_size says 64")
    change = {"value": lambda x: x[:4]}
    assert_refused(v1, call, change, "the cache value has shape .* they must be the same")
    narrow = {"key": lambda x: x[..., :128].contiguous()}
    assert_refused(v1, call, narrow, "the cache key has head size 64 and query 128")
    odd = {name: lambda x: x[..., :-1].contiguous() for name in ("key", "value")}
    assert_refused(v1, call, odd, "H=255, no multiple of num_key_value_heads=2")
    first = paged(heads_first=True)
    fewer = {name: lambda x: x[:, :1].contiguous() for name in ("key", "value")}
    assert_refused(v1, first, fewer, "the cache key has 1 heads; num_key_value_heads says 2")
    for layout in ("BSH", "BSND"):
        options = {"atten_mask": None, "sparse_mode": 0}
        changed = paged(layout, heads_first=True, **options)
        said = r"the cache key has shape .* takes \(blocks, block_size, KV_N \* D\)$"
        assert_refused(v1, paged(layout, **options), changed, said)
    v1(**paged("BNSD", heads_first=True, atten_mask=None, sparse_mode=0))
    call, changed = (second(paged(kv_heads=8, heads_first=first)) for first in (False, True))
    assert_refused(v2, call, changed, "cache in TND with as many key/value heads as query heads")


def test_wide_rows_of_a_cache():
    """65,535 elements a token in (blocks, block_size, H), no limit with heads first."""
    options = {"heads": 256, "width": 256, "blocks": 2, "rows": 2, "size": 16}
    wide = {**options, "atten_mask": None, "sparse_mode": 0}
    fits = paged("BNSD", **{**wide, "size": 128}, kv_heads=128)
    changed = paged("BNSD", **{**wide, "size": 128}, kv_heads=256)
    assert_refused(v1, fits, changed, "KV_N [*] D = 65536; .* 65535 at most")
    v1(**paged("BNSD", **{**wide, "size": 128}, kv_heads=256, heads_first=True))


def test_requests_that_share_blocks():
    call = paged(blocks=3)
    call["block_table"][1, 0] = 0
    v1(**call)
    call["block_table"] = torch.tensor([[0, 1, 9], [0, 9, 9]], dtype=torch.int32)
    two = {name: call[name][:2] for name in ("key", "value")}
    v1(**{**call, **two})
    assert_refused(v1, call, two, "the cache has 2 blocks; .* need 3 together", strict=True)
    assert_refused(v1, call, two, "need 3 together", forbid=("shared_blocks",))


def test_lengths_of_a_cache_are_not_cumulative():
    """What is right without a block table is wrong with one: here it asks for more blocks."""
    changed = {"actual_seq_lengths_kv": [200, 400]}
    assert_refused(v1, paged(), changed, "block_table has 3 entries a request; .* needs 4")


def test_contiguity():
    assert_refused(v1, dense(), {"query": strided}, "query is not contiguous")
    for name in ("key", "value"):
        v1(**{**dense(), name: strided(dense()[name])})
        assert_refused(v1, dense(), {name: strided}, f"{name} is not contiguous", strict=True)
        said = f"{name} is not contiguous; call"
        assert_refused(v1, dense(), {name: strided}, said, forbid=("strided_kv",))
        # vLLM's hybrid models interleave the caches of layers: such a one is a copy away.
        assert_refused(v1, paged(), {name: strided}, said)
    change = {"atten_mask": MASK.t()}
    assert_refused(v1, dense(), change, "atten_mask is not contiguous")


@pytest.mark.parametrize("name", ["key", "value"])
def test_contiguity_from_cann_9_1(name):
    call = second(dense())
    for cann in ("8.5", "9.0"):
        with settings(cann=cann):
            v2(**{**call, name: strided(call[name])})
    for cann in ("9.1", "9.10", "10.0"):
        said = f"{name} is not contiguous; from CANN 9.1"
        assert_refused(v2, call, {name: strided}, said, cann=cann)
        with settings(cann=cann):
            v1(**{**dense(), name: strided(dense()[name])})

"""Each limit of fused inference attention: a call that is taken, one change, and what is said."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_batches import MASK  # noqa: E402
from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score as v1,
)
from ascend_patch.kernels.npu_ops.fused_infer import (  # noqa: E402
    npu_fused_infer_attention_score_v2 as v2,
)
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402

BF16 = torch.bfloat16
RENAMED = {
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
}


def dense(layout="TND", *, heads=8, kv_heads=2, width=128, rows=6, columns=6, **options):
    """Two requests without a cache, causal."""
    sizes = {"T": 2 * rows, "B": 2, "S": rows, "N": heads, "D": width, "H": heads * width}
    kv_sizes = {**sizes, "T": 2 * columns, "S": columns, "N": kv_heads, "H": kv_heads * width}
    letters = layout.partition("_")[0]
    query = torch.randn(*(sizes[x] for x in letters), dtype=BF16)
    key, value = torch.randn(2, *(kv_sizes[x] for x in letters), dtype=BF16)
    ragged = "T" in letters
    return {
        "query": query,
        "key": key,
        "value": value,
        "atten_mask": MASK,
        "actual_seq_lengths": [rows, 2 * rows] if ragged else [rows, rows],
        "actual_seq_lengths_kv": [columns, 2 * columns] if ragged else [columns, columns],
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": width**-0.5,
        "input_layout": layout,
        "sparse_mode": 3,
        **options,
    }


def paged(layout="TND", *, heads=8, kv_heads=2, width=128, size=128, blocks=8, rows=6, **options):
    """Two requests of 200 and 100 tokens in blocks."""
    call = dense(layout, heads=heads, kv_heads=kv_heads, width=width, rows=rows)
    if options.pop("heads_first", False):
        shape = (blocks, kv_heads, size, width)
    else:
        shape = (blocks, size, kv_heads * width)
    entries = -(-200 // size)
    table = torch.full((2, entries + 1), -1, dtype=torch.int32)
    table[0, :entries] = torch.arange(entries) % blocks
    table[1, : -(-100 // size)] = torch.arange(-(-100 // size)) % blocks
    cache = torch.randn(2, *shape, dtype=BF16)
    return {
        **call,
        "key": cache[0],
        "value": cache[1],
        "block_table": table,
        "block_size": size,
        "actual_seq_lengths_kv": [200, 100],
        **options,
    }


def second(call):
    """The same call of the second version."""
    return {RENAMED.get(name, name): value for name, value in call.items()}


def int8(**options):
    """A decode step over int8 keys, as C8 makes it."""
    call = paged("BNSD", rows=1, atten_mask=None, sparse_mode=0)
    for name in ("key", "value"):
        call[name] = torch.randint(-128, 128, call[name].shape, dtype=torch.int8)
        call[f"{name}_antiquant_scale"] = torch.rand(1, 2, 1, 128).to(BF16)
    return {**call, **options}


def strided(x):
    return torch.cat((x, x), -1)[..., : x.shape[-1]]


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


def test_lengths_of_a_cache_are_not_cumulative():
    """What is right without a block table is wrong with one: here it asks for more blocks."""
    changed = {"actual_seq_lengths_kv": [200, 400]}
    assert_refused(v1, paged(), changed, "block_table has 3 entries a request; .* needs 4")


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


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_compressed_masks(mode):
    call = dense(sparse_mode=mode)
    assert_refused(v1, call, {"atten_mask": None}, f"atten_mask is missing; sparse_mode={mode}")
    for shape in ((12, 12), (2048,), (2, 2048, 2048), (1024, 1024)):
        mask = torch.zeros(shape, dtype=torch.int8)
        assert_refused(v1, call, {"atten_mask": mask}, r"needs the compressed mask of shape \(2048")
    for dtype in (torch.float32, BF16, torch.int32):
        change = {"atten_mask": MASK.to(dtype)}
        assert_refused(v1, call, change, "it must be bool, int8 or uint8")
    for mask in (1 - MASK, torch.zeros_like(MASK), torch.triu(torch.ones_like(MASK))):
        assert_refused(v1, call, {"atten_mask": mask}, "differs from the plain causal mask in")
    for form in (MASK.bool(), MASK.to(torch.uint8), MASK[None], MASK[None, None]):
        assert torch.equal(v1(**{**call, "atten_mask": form})[0], v1(**call)[0])


def test_one_wrong_place_in_a_mask_is_found():
    """Also where the mask was right when it was last seen."""
    mask = MASK.clone()
    call = dense(atten_mask=mask)
    v1(**call)
    mask[1999, 7] = 1
    with pytest.raises(RuntimeError, match="differs from the plain causal mask in 1 places"):
        v1(**call)
    mask[1999, 7] = 0
    v1(**call)
    with torch.inference_mode():
        own = MASK.clone()
        v1(**{**call, "atten_mask": own})
        own[7, 9] = 0
        with pytest.raises(RuntimeError, match="in 1 places"):
            v1(**{**call, "atten_mask": own})


@pytest.mark.parametrize("mode", [-1, 5, 6, 7, 8, 9])
def test_modes_that_are_not_there(mode):
    assert_refused(v1, dense(), {"sparse_mode": mode}, f"sparse_mode={mode}; .* 0, 1, 2, 3 and 4")


def test_modes_of_the_second_version_without_groups():
    """Documented: 0 without a mask, 3 and 4 with the compressed one."""
    call = second(dense(kv_heads=8))
    assert_refused(v2, call, {"sparse_mode": 2}, "sparse_mode=2 in TND with as many key/value")
    for mode in (3, 4):
        v2(**{**call, "sparse_mode": mode})
    v2(**{**second(dense()), "sparse_mode": 2})


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


def test_bands_that_are_empty():
    call = dense(sparse_mode=4, pre_tokens=3, next_tokens=0)
    changed = {"pre_tokens": -3, "next_tokens": 2}
    assert_refused(v1, call, changed, "leave nothing between them")
    v1(**{**call, "pre_tokens": -3, "next_tokens": 3})


def test_masks_in_full():
    full = torch.zeros(6, 6, dtype=torch.bool)
    call = dense("BSND", sparse_mode=1, atten_mask=full)
    assert_refused(v1, call, {"atten_mask": None}, "sparse_mode=1 needs it in full")
    for shape in ((5, 6), (6, 5), (2, 6, 6), (3, 1, 6, 6), (2, 2, 6, 6), (6,)):
        mask = torch.zeros(shape, dtype=torch.bool)
        said = r"atten_mask has shape .* needs \(6, 6\)"
        assert_refused(v1, call, {"atten_mask": mask}, said)
    for shape in ((9, 16), (1, 6, 6), (2, 1, 6, 6), (1, 1, 8, 8)):
        v1(**{**call, "atten_mask": torch.zeros(shape, dtype=torch.bool)})
    ragged = dense(sparse_mode=0, atten_mask=None)
    assert_refused(v1, ragged, {"atten_mask": full}, "atten_mask in full with input_layout='TND'")
    # A paged cache needs columns for all entries of the block table.
    cached = paged("BSND", sparse_mode=0, atten_mask=torch.zeros(6, 384, dtype=torch.bool))
    mask = torch.zeros(6, 383, dtype=torch.bool)
    assert_refused(v1, cached, {"atten_mask": mask}, r"needs \(6, 384\)")


def test_precision_modes():
    for value in (-1, 4):
        assert_refused(v1, dense(), {"inner_precise": value}, f"inner_precise={value}; .* 0..3")
    many = second(dense(kv_heads=8))
    said = "inner_precise=1 in TND with as many .* for torch.bfloat16 it must be 0..0"
    assert_refused(v2, many, {"inner_precise": 1}, said)
    half = {name: many[name].half() for name in ("query", "key", "value")}
    v2(**{**many, **half, "inner_precise": 1})
    single = dense("BSND", rows=1, sparse_mode=0, atten_mask=None)
    assert_refused(v1, single, {"inner_precise": 2}, "inner_precise=2; it must be 0..1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pse_shift", torch.zeros(1)),
        ("query_rope", torch.zeros(1)),
        ("quant_scale2", torch.zeros(1)),
        ("antiquant_scale", torch.zeros(1)),
        ("query_padding_size", torch.zeros(1)),
        ("key_shared_prefix", torch.zeros(1)),
        ("actual_shared_prefix_len", [3]),
        ("antiquant_mode", 1),
    ],
)
def test_what_is_not_emulated(name, value):
    v1(**dense(), **{name: None if name != "antiquant_mode" else 0})
    assert_refused(v1, dense(), {name: value}, f"{name} is not emulated; leave it at its default")


def test_int8_keys():
    call = int8()
    for name in ("key_antiquant_scale", "value_antiquant_scale"):
        assert_refused(v1, call, {name: None}, "scale")
    both = {"key_antiquant_scale": None, "value_antiquant_scale": None}
    assert_refused(v1, call, both, "key is torch.int8 and its scale is missing")
    scale = call["key_antiquant_scale"]
    given = {"key_antiquant_scale": scale, "value_antiquant_scale": scale}
    assert_refused(v1, paged("BNSD", rows=1, sparse_mode=0, atten_mask=None), given, "is given")
    change = {"key_antiquant_offset": scale}
    assert_refused(v1, call, change, "the offsets of key and value must both be given")
    change = {"key_antiquant_scale": lambda x: x.half()}
    assert_refused(v1, call, change, "of key is torch.float16; it must be torch.bfloat16")
    change = {"value_antiquant_scale": lambda x: x[..., :64]}
    assert_refused(v1, call, change, r"of value has shape \(1, 2, 1, 64\); .*\(1, 2, 1, 128\)")
    with settings(allow=("float32",)):
        v1(**{**call, "query": call["query"].float()})
    for name in ("key_antiquant_mode", "value_antiquant_mode"):
        assert_refused(v1, call, {name: 1}, f"{name}=1 .* only 0, per channel")
    assert_refused(v1, call, {"block_size": 48}, "block_size=48; .* multiple of 32 .*int8 keys")
    mixed = {"value": call["value"].to(BF16)}
    assert_refused(v1, call, mixed, "value is torch.bfloat16 and key is torch.int8")
    more = paged("BNSD", sparse_mode=0, atten_mask=None)
    changed = {"query": more["query"], "actual_seq_lengths": more["actual_seq_lengths"]}
    assert_refused(v1, call, changed, "int8 keys and values need Q_S = 1")


def test_sinks():
    sinks = torch.zeros(8, dtype=BF16)
    call = second(dense(learnable_sink=sinks))
    assert_refused(v2, call, {"learnable_sink": lambda x: x.float()}, "it must be bfloat16")
    change = {"learnable_sink": lambda x: x[:4]}
    assert_refused(v2, call, change, r"learnable_sink has shape \(4,\); it must be \(8,\)")
    changed = second(dense("BSND"))
    assert_refused(v2, call, changed, "learnable_sink with input_layout='BSND'; use 'TND'")
    wide = second(dense(width=192, kv_heads=8))
    assert_refused(v2, call, wide, "learnable_sink with values of head size 192; 128 is the most")


def test_what_out_must_be():
    from ascend_patch.kernels.npu_ops.fused_infer import v1_out

    call = dense()
    out, lse = torch.empty(12, 8, 128, dtype=BF16), torch.empty(1)
    for wrong, said in (
        ([out], "out has 1 tensors"),
        ([out[:6], lse], "out's attention_out has shape"),
        ([out, torch.empty(7)], "out's softmax_lse has shape"),
        ([out.float(), lse], "out's attention_out is torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=f"^npu_fused_infer_attention_score: {said}"):
            v1_out(**call, out=wrong)

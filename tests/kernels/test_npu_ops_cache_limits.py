"""What the cache operators refuse: each documented limit, by its sentence, with nothing written."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_limits import assert_refused  # noqa: E402

from ascend_patch.kernels.npu_ops import cache  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402

HALF = torch.float16


def ones(*shape, dtype=HALF):
    return torch.ones(shape, dtype=dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def write_call():
    return {
        "key": ones(3, 2, 16),
        "value": ones(3, 2, 8),
        "key_cache": ones(4, 16, 2, 16),
        "value_cache": ones(4, 16, 2, 8),
        "slot_indices": ints(0, 17, -1),
    }


def wide(x):
    return x.float()


def gap(x):
    """The same shape over twice as much memory."""
    return torch.cat((x, x), -1)[..., : x.shape[-1]]


STRIDES = r"key_cache \[4, 16, 2, 16\] has strides .* to other places"
WRITES = {
    "int64 slots": ({"slot_indices": lambda x: x.long()}, "slot_indices is torch.int64, not int32"),
    "too few slots": ({"slot_indices": ints(0, 1)}, r"slot_indices \[2\] must be \[3\]"),
    "slots of two dimensions": ({"slot_indices": ints(0, 1, 2)[:, None]}, r"must be \[3\]"),
    "a slot beyond": ({"slot_indices": ints(0, 64, 1)}, "has 64 and the cache 64 slots"),
    "value's dtype": ({"value": lambda x: x.bfloat16()}, "value torch.bfloat16.* same dtype"),
    "cache's dtype": ({"key_cache": lambda x: x.bfloat16()}, "key_cache torch.bfloat16"),
    "float32": (
        dict.fromkeys(("key", "value", "key_cache", "value_cache"), wide),
        "key is torch.float32, not one of",
    ),
    "flat keys": ({"key": lambda x: x.flatten(1)}, r"key \[3, 32\] must be \[tokens, heads"),
    "flat cache": ({"value_cache": lambda x: x.flatten(2)}, "value_cache .* must be .blocks"),
    "another head size": ({"key_cache": ones(4, 16, 2, 24)}, "the same heads and head_size"),
    "another number of heads": ({"value_cache": ones(4, 16, 1, 8)}, "the same heads and head_size"),
    "tokens of value": ({"value": ones(4, 2, 8)}, "the same tokens and heads"),
    "blocks of value": ({"value_cache": ones(5, 16, 2, 8)}, "same first 3 dimensions"),
    "block size of value": ({"value_cache": ones(4, 8, 2, 8)}, "same first 3 dimensions"),
    "no token": (
        {"key": ones(0, 2, 16), "value": ones(0, 2, 8), "slot_indices": ints()},
        r"key \[0, 2, 16\] is empty",
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_reshape_and_cache_refuses(name):
    changes, sentence = WRITES[name]
    assert_refused(cache._npu_reshape_and_cache, write_call(), changes, sentence)


def test_strided_caches_are_an_allowance():
    call = write_call()
    assert_refused(
        cache._npu_reshape_and_cache, call, {"key_cache": gap}, STRIDES, forbid=["strided_cache"]
    )
    alone = {"key": call["key"], "key_cache": call["key_cache"], "slot_indices": ints(0, 1, 2)}
    one = cache._npu_reshape_and_cache_siso
    assert_refused(one, alone, {"key_cache": gap}, STRIDES, strict=True)
    assert_refused(one, alone, {"key": wide, "key_cache": wide}, "key is torch.float32")
    assert_refused(one, alone, {"key_cache": wide}, "key_cache torch.float32; all must have")
    assert_refused(one, alone, {"key_cache": ones(4, 16, 1, 32)}, "the same heads and head_size")
    nothing = {"key": ones(0, 2, 16), "slot_indices": ints()}
    assert_refused(one, alone, nothing, r"key \[0, 2, 16\] is empty")
    assert_refused(one, alone, {"slot_indices": ints(0, 1, 64)}, "has 64 and the cache 64 slots")
    one(**{**alone, "key_cache": gap(alone["key_cache"])})


def test_float32_is_an_allowance():
    call = {n: x.float() if x.dtype == HALF else x for n, x in write_call().items()}
    with settings(allow=["float32"]):
        cache._npu_reshape_and_cache(**call)
    with settings(), pytest.raises(OperatorError, match=r"torch\.float32"):
        cache._npu_reshape_and_cache(**call)


def scatter_call(mode="PA_NZ"):
    nz = mode == "PA_NZ"
    return {
        "key": ones(3, 2, 32),
        "value": ones(3, 2, 16),
        "key_cache": ones(4, 4, 16, 16) if nz else ones(4, 16, 2, 32),
        "value_cache": ones(4, 2, 16, 16) if nz else ones(4, 16, 2, 16),
        "slot_mapping": ints(0, 17, 63),
    }


SCATTERS = {
    "a slot twice": ({"slot_mapping": ints(0, 17, 17)}, "names a slot twice"),
    "a negative slot": ({"slot_mapping": ints(0, -1, 17)}, "goes from -1 to 17.* not skipped"),
    "a slot beyond": ({"slot_mapping": ints(0, 64, 17)}, "slots 0 to 63"),
    "slots of another dtype": ({"slot_mapping": ints(0, 1, 2).short()}, "not int32 or int64"),
    "too few slots": ({"slot_mapping": ints(0, 1)}, r"must be \[3\]"),
    "key not contiguous": ({"key": gap}, "key must be contiguous"),
    "cache not contiguous": ({"value_cache": gap}, "value_cache must be contiguous"),
    "ND caches": (
        {"key_cache": ones(4, 16, 2, 32), "value_cache": ones(4, 16, 2, 16)},
        'must be NZ.* say cache_mode="Norm"',
    ),
    "an ND cache of keys": ({"key_cache": ones(4, 16, 2, 32)}, "key_cache .* must be NZ"),
    "an ND cache of values": ({"value_cache": ones(4, 16, 2, 16)}, "value_cache .* must be NZ"),
    "value's dtype": ({"value": lambda x: x.bfloat16()}, "same dtype"),
    "float32": (
        dict.fromkeys(("key", "value", "key_cache", "value_cache"), wide),
        "key is torch.float32, not one of",
    ),
    "tokens of value": ({"value": ones(4, 2, 16)}, "same tokens and heads"),
    "blocks of value": ({"value_cache": ones(5, 2, 16, 16)}, "same blocks and block_size"),
    "compressed": ({"seq_lens": ints(3)}, "compressed caches .* not emulated"),
    "four dimensions": ({"key": lambda x: x[None]}, "compressed caches"),
    "flat value": ({"value": lambda x: x.flatten(1)}, "value .* must be .tokens, heads"),
    "an unknown mode": ({"cache_mode": "NZ"}, "cache_mode must be Norm or PA_NZ, not 'NZ'"),
    "a mode before 2.10": ({"cache_mode": "Norm"}, "exists since torch_npu 2.10.0"),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_scatter_refuses(name):
    changes, sentence = SCATTERS[name]
    assert_refused(cache.npu_scatter_pa_kv_cache, scatter_call(), changes, sentence)


def test_scatter_into_nd_refuses_what_nz_refuses():
    call = scatter_call("Norm")
    with settings(release="2.10.0"):
        cache.npu_scatter_pa_kv_cache(**call, cache_mode="Norm")
        for changes, sentence in (
            ({"key_cache": ones(4, 16, 1, 64)}, "the same heads and head_size"),
            ({"value_cache": ones(4, 16, 1, 32)}, "the same heads and head_size"),
            ({"value_cache": ones(4, 8, 2, 16)}, "same blocks and block_size"),
            ({"slot_mapping": ints(0, -1, 1)}, "not skipped"),
        ):
            with pytest.raises(OperatorError, match=sentence):
                cache.npu_scatter_pa_kv_cache(**{**call, **changes}, cache_mode=None)


def read_call(gathering: bool):
    lengths, starts = ("seq_lens", "seq_offset") if gathering else ("context_lens", "seq_starts")
    return {
        "key_cache": ones(4, 16, 2, 16),
        "value_cache": ones(4, 16, 2, 8),
        "block_tables" if gathering else "block_table": ints([0, 1], [3, 2]),
        lengths: ints(20, 16),
        starts: ints(0, 16),
        "key": ones(36, 2, 16),
        "value": ones(36, 2, 8),
    }


LOADS = {
    "int64 table": ({"block_table": lambda x: x.long()}, "block_table is torch.int64"),
    "int64 lengths": ({"context_lens": lambda x: x.long()}, "context_lens is torch.int64"),
    "int64 starts": ({"seq_starts": lambda x: x.long()}, "must be int32"),
    "three lengths": ({"context_lens": ints(20, 16, 1)}, r"must hold 2 lengths for a batch of 2"),
    "two of three cumulative ones": ({"cumsum": True}, "must hold 3 cumulative ones"),
    "cumulative and falling": (
        {"cumsum": True, "context_lens": ints(0, 20, 16)},
        "must start at 0 or more and not fall",
    ),
    "negative length": ({"context_lens": ints(20, -1)}, "must not be negative"),
    "negative start": ({"seq_starts": ints(0, -16)}, "has negative ones"),
    "three starts": ({"seq_starts": ints(0, 0, 0)}, r"must be int32 \[2\]"),
    "table too narrow": ({"seq_starts": ints(0, 32)}, "context 1 is read from blocks 2 to 2"),
    "a block beyond": (
        {"block_table": ints([0, 4], [3, 2])},
        "blocks 0 to 4 of a cache that has 4",
    ),
    "a negative block": ({"block_table": ints([-1, 1], [3, 2])}, "blocks -1 to 1"),
    "too few rows": (
        {"key": ones(35, 2, 16), "value": ones(35, 2, 8)},
        "are 36 tokens and key has 35 rows",
    ),
    "rows of value": ({"value": ones(35, 2, 8)}, "must have the same tokens"),
    "heads": ({"key": ones(36, 1, 16)}, "key .* the same heads and head_size"),
    "heads of value": ({"value": ones(36, 1, 8)}, "value .* the same heads and head_size"),
    "dtype": ({"key": lambda x: x.bfloat16()}, "all must have the same dtype"),
    "float32": (
        dict.fromkeys(("key", "value", "key_cache", "value_cache"), wide),
        "key_cache is torch.float32",
    ),
    "alignment": (
        {"value_cache": ones(4, 16, 2, 4), "value": ones(36, 2, 4)},
        "value_cache .* is 16 bytes; it must be a multiple of 32",
    ),
    "blocks of value": ({"value_cache": ones(5, 16, 2, 8)}, "same first 2 dimensions"),
    "flat cache": ({"key_cache": lambda x: x.flatten(2)}, "key_cache .* must be .blocks"),
    "flat table": ({"block_table": ints(0, 1)}, r"must be \[batch, blocks\]"),
}


@pytest.mark.parametrize("name", LOADS)
def test_paged_cache_load_refuses(name):
    changes, sentence = LOADS[name]
    assert_refused(cache.npu_paged_cache_load_out, read_call(False), changes, sentence)


GATHERS = {
    "heads": ({"value": ones(36, 1, 8)}, "value .* the same heads and head_size"),
    "rows of value": ({"value": ones(35, 2, 8)}, "must have the same tokens"),
    "int64 table": ({"block_tables": lambda x: x.long()}, "block_tables is torch.int64"),
    "int64 lengths": ({"seq_lens": lambda x: x.long()}, "seq_lens is torch.int64"),
    "lengths and rows": (
        {"seq_lens": ints(20, 15)},
        "key has 36 rows and seq_lens go from 0 to 35",
    ),
    "not cumulative": ({"is_seq_lens_cumsum": True}, "must hold 3 cumulative ones"),
    "cumulative from 1": (
        {"is_seq_lens_cumsum": True, "seq_lens": ints(1, 20, 36)},
        "seq_lens go from 1 to 36",
    ),
    "cache not contiguous": ({"key_cache": gap}, "key_cache .* must be contiguous"),
    "output not contiguous": ({"value": gap}, "value .* must be contiguous"),
    "dtype": ({"value": lambda x: x.bfloat16()}, "all must have the same dtype"),
    "float32": (
        dict.fromkeys(("key", "value", "key_cache", "value_cache"), wide),
        "key_cache is torch.float32",
    ),
    "tokens of 148 KiB": (
        {"key_cache": ones(4, 16, 300, 256), "key": ones(36, 300, 256)},
        "a token of key is 153600 bytes",
    ),
    "starts": ({"seq_offset": ints(0)}, r"must be int32 \[2\]"),
}


@pytest.mark.parametrize("name", GATHERS)
def test_gather_refuses(name):
    changes, sentence = GATHERS[name]
    with settings(release="2.10.0"):
        assert_refused(cache.npu_gather_pa_kv_cache, read_call(True), changes, sentence)


def test_gather_is_younger_than_2_10_and_strict_about_blocks():
    call = read_call(True)
    holes = {"block_tables": ints([0, 9], [3, 2])}
    with settings(release="2.10.0"):
        assert_refused(cache.npu_gather_pa_kv_cache, call, holes, "blocks 0 to 9", strict=True)
        assert_refused(
            cache.npu_gather_pa_kv_cache, call, {}, "exists since torch_npu 2.10.0", release="2.9.0"
        )

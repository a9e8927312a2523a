"""The operators that move keys and values in and out of a paged cache, bit for bit.

The oracle counts bytes: a slot is a run of a flat array, and every element that no slot names must
keep the pattern that it was filled with.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.npu_ops import cache  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.int8)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def bits(x) -> np.ndarray:
    return x.contiguous().view(BITS[x.element_size()]).numpy()


def filled(generator, *shape, dtype):
    """Random bit patterns, NaN and infinity among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    limit = 2 ** (8 * size - 1)
    found = torch.randint(-limit, limit, shape, generator=generator)
    return found.to(BITS[size]).view(dtype)


def generator_of(seed: int):
    return torch.Generator().manual_seed(seed)


def distinct_slots(generator, count, places, dtype=torch.int32):
    return torch.randperm(places, generator=generator)[:count].to(dtype)


def after_writes(cache_bits, rows, slots):
    """ND: slot s of [blocks, block_size, H, D] is row s of a table H * D wide."""
    table = cache_bits.copy()
    flat = table.reshape(-1, rows[0].size)
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            flat[slot] = row.reshape(-1)
    return table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(14, 1, 16, 9), (33, 4, 128, 3), (1, 2, 100, 2)], ids=str)
def test_reshape_and_cache_fills_the_slots_and_nothing_else(seed, dtype, shape):
    tokens, heads, block_size, blocks = shape
    generator = generator_of(seed)
    sizes = torch.randint(1, 256, (2,), generator=generator).tolist()
    rows = [filled(generator, tokens, heads, size, dtype=dtype) for size in sizes]
    caches = [filled(generator, blocks, block_size, heads, size, dtype=dtype) for size in sizes]
    slots = distinct_slots(generator, tokens, blocks * block_size)
    slots[:: max(2, tokens // 3)] = -1
    expected = [
        after_writes(bits(c), bits(r), slots.tolist()) for c, r in zip(caches, rows, strict=True)
    ]
    assert cache._npu_reshape_and_cache(*rows, *caches, slots) is None
    for found, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(bits(found), wanted)
    # One tensor, the same slots.
    alone = filled(generator, blocks, block_size, heads, sizes[0], dtype=dtype)
    wanted = after_writes(bits(alone), bits(rows[0]), slots.tolist())
    cache._npu_reshape_and_cache_siso(rows[0], alone, slots)
    np.testing.assert_array_equal(bits(alone), wanted)


@pytest.mark.parametrize("layout", ["blocks first", "padded blocks", "heads of a projection"])
def test_reshape_and_cache_writes_through_strides(seed, layout):
    generator, dtype = generator_of(seed), torch.bfloat16
    blocks, block_size, heads, size, tokens = 5, 16, 2, 24, 11
    projection = filled(generator, tokens, 2 * heads * size + 7, dtype=dtype)
    rows = [
        projection[:, start : start + heads * size].unflatten(1, (heads, size))
        for start in (7, 7 + heads * size)
    ]
    if layout == "blocks first":
        whole = filled(generator, blocks, 2, block_size, heads, size, dtype=dtype)
        caches = [whole[:, 0], whole[:, 1]]
    elif layout == "padded blocks":
        whole = filled(generator, blocks, 2, 2 * block_size, heads, size, dtype=dtype)
        caches = [whole[:, 0, :block_size], whole[:, 1, :block_size]]
    else:
        whole = filled(generator, blocks, block_size, heads, 2 * size, dtype=dtype)
        caches = [whole[..., :size], whole[..., size:]]
    assert not caches[0].is_contiguous()
    places = np.arange(whole.numel()).reshape(whole.shape)
    where = [places[tuple(_index(layout, which))] for which in (0, 1)]
    expected = bits(whole).copy().reshape(-1)
    slots = distinct_slots(generator, tokens, blocks * block_size)
    for part, values in zip(where, rows, strict=True):
        for token, slot in enumerate(slots.tolist()):
            expected[part[slot // block_size, slot % block_size]] = bits(values)[token]
    cache._npu_reshape_and_cache(*rows, *caches, slots)
    np.testing.assert_array_equal(bits(whole).reshape(-1), expected)


def _index(layout: str, which: int) -> list:
    everything = slice(None)
    return {
        "blocks first": [everything, which],
        "padded blocks": [everything, which, slice(0, 16)],
        "heads of a projection": [..., slice(24 * which, 24 * which + 24)],
    }[layout]


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_scatter_into_nz_is_the_layout_of_its_own_tests(seed, block_size, slot_dtype):
    generator = generator_of(seed)
    tokens, heads, sizes, blocks, width = 16, 4, (32, 64), 2, 16
    rows = [filled(generator, tokens, heads, size, dtype=torch.float16) for size in sizes]
    shapes = [(blocks, heads * size // width, block_size, width) for size in sizes]
    caches = [filled(generator, *shape, dtype=torch.float16) for shape in shapes]
    slots = distinct_slots(generator, tokens, blocks * block_size, slot_dtype)
    before = [c.clone() for c in caches]
    expected = []
    for found, values in zip(caches, rows, strict=True):
        wanted = bits(found).copy()
        for token, slot in enumerate(slots.tolist()):
            for element in range(heads * values.shape[2]):
                at = slot // block_size, element // width, slot % block_size, element % width
                wanted[at] = bits(values)[token].reshape(-1)[element]
        expected.append(wanted)
    copies = cache.npu_scatter_pa_kv_cache_functional(*rows, *caches, slots)
    for copy, old, found, wanted in zip(copies, before, caches, expected, strict=True):
        np.testing.assert_array_equal(bits(copy), wanted)
        np.testing.assert_array_equal(bits(found), bits(old))
    cache.npu_scatter_pa_kv_cache(*rows, *caches, slots)
    for found, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(bits(found), wanted)


@pytest.mark.parametrize("mode", ["Norm", None])
def test_scatter_into_nd(seed, mode):
    generator = generator_of(seed)
    rows = [filled(generator, 16, 4, 32, dtype=torch.bfloat16) for _ in range(2)]
    caches = [filled(generator, 2, 32, 4, 32, dtype=torch.bfloat16) for _ in range(2)]
    slots = distinct_slots(generator, 16, 64)
    expected = [
        after_writes(bits(c), bits(r), slots.tolist()) for c, r in zip(caches, rows, strict=True)
    ]
    with settings(release="2.10.0"):
        cache.npu_scatter_pa_kv_cache(*rows, *caches, slots, cache_mode=mode)
    for found, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(bits(found), wanted)


def gathered(cache_bits, table, lengths, starts, absent_is_zero):
    """Row by row: token j of a sequence is in the table's column start // block_size + j // b."""
    blocks, block_size = cache_bits.shape[:2]
    rows = []
    for request, length in enumerate(lengths):
        first = 0 if starts is None else int(starts[request]) // block_size
        for j in range(length):
            column = first + j // block_size
            block = table[request][column] if column < len(table[request]) else -1
            if 0 <= block < blocks:
                rows.append(cache_bits[block, j % block_size])
            else:
                assert absent_is_zero
                rows.append(np.zeros_like(cache_bits[0, 0]))
    return np.stack(rows) if rows else np.zeros((0, *cache_bits.shape[2:]), cache_bits.dtype)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
def test_gather_and_load_read_the_same_tokens(seed, cumulative, with_starts):
    generator = generator_of(seed)
    batch, blocks, block_size, heads, sizes = 4, 12, 16, 2, (64, 16)
    caches = [
        filled(generator, blocks, block_size, heads, size, dtype=torch.float16) for size in sizes
    ]
    table = torch.randint(0, blocks, (batch, 6), generator=generator, dtype=torch.int32)
    lengths = torch.randint(0, 3 * block_size, (batch,), generator=generator)
    lengths[0], lengths[1] = 0, 2 * block_size
    starts = None
    if with_starts:
        starts = torch.randint(0, 3 * block_size, (batch,), generator=generator, dtype=torch.int32)
    total = int(lengths.sum())
    lens = lengths.int()
    if cumulative:
        lens = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    expected = [gathered(bits(c), table.tolist(), lengths.tolist(), starts, False) for c in caches]
    out = [filled(generator, total, heads, size, dtype=torch.float16) for size in sizes]
    with settings(release="2.10.0"):
        cache.npu_gather_pa_kv_cache(
            *caches, table, lens, *out, seq_offset=starts, is_seq_lens_cumsum=cumulative
        )
    loaded = cache.npu_paged_cache_load(*caches, table, lens, seq_starts=starts, cumsum=cumulative)
    # The one that is given its outputs leaves the rows behind the last context alone.
    given = [filled(generator, total + 3, heads, size, dtype=torch.float16) for size in sizes]
    tails = [bits(x)[total:].copy() for x in given]
    returned = cache.npu_paged_cache_load_out(
        *caches, table, lens, seq_starts=starts, cumsum=cumulative, key=given[0], value=given[1]
    )
    for part, wanted in enumerate(expected):
        np.testing.assert_array_equal(bits(out[part]), wanted)
        np.testing.assert_array_equal(bits(loaded[part]), wanted)
        np.testing.assert_array_equal(bits(given[part])[:total], wanted)
        np.testing.assert_array_equal(bits(given[part])[total:], tails[part])
        assert returned[part] is given[part]


def test_gather_reads_zeros_from_blocks_that_there_are_not(seed):
    generator = generator_of(seed)
    caches = [filled(generator, 3, 16, 1, 16, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.tensor([[2, -1, 7], [1, 0, 2]], dtype=torch.int32)
    lengths, starts = torch.tensor([48, 40]).int(), torch.tensor([0, 20]).int()
    out = [filled(generator, 88, 1, 16, dtype=torch.bfloat16) for _ in range(2)]
    expected = [gathered(bits(c), table.tolist(), [48, 40], [0, 20], True) for c in caches]
    with settings(release="2.10.0"):
        copies = cache.npu_gather_pa_kv_cache_functional(
            *caches, table, lengths, *out, seq_offset=starts
        )
    for copy, wanted in zip(copies, expected, strict=True):
        np.testing.assert_array_equal(bits(copy), wanted)
    assert (expected[0][16:48] == 0).all()


def test_what_was_written_is_read_again(seed):
    """Random requests through write, load and gather; tables with shared blocks and holes."""
    generator = generator_of(seed)
    for _ in range(30):
        batch, blocks, block_size, heads, size = 3, 20, 16, 2, 16
        lengths = torch.randint(1, 60, (batch,), generator=generator).tolist()
        order = torch.randperm(blocks, generator=generator).tolist()
        table, rows, slots = torch.full((batch, 4), -1, dtype=torch.int32), [], []
        for request, length in enumerate(lengths):
            for place in range(-(-length // block_size)):
                table[request, place] = order.pop()
            values = filled(generator, length, heads, size, dtype=torch.float16)
            rows.append(values)
            slots += [
                int(table[request, j // block_size]) * block_size + j % block_size
                for j in range(length)
            ]
        key = torch.cat(rows)
        caches = [filled(generator, blocks, block_size, heads, size, dtype=torch.float16)] * 1
        caches.append(caches[0].clone())
        cache._npu_reshape_and_cache(key, key, *caches, torch.tensor(slots, dtype=torch.int32))
        found = cache.npu_paged_cache_load(*caches, table, torch.tensor(lengths).int())
        np.testing.assert_array_equal(bits(found[0]), bits(key))
        np.testing.assert_array_equal(bits(found[1]), bits(key))

"""From plans to addresses: which blocks belong together, and which ranges are joined."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("torch", reason="torch is not installed")
np = pytest.importorskip("numpy", reason="numpy is not installed")

from kv_topologies import changed, planned, topology  # noqa: E402

from ascend_patch.kernels import kv_layout  # noqa: E402
from ascend_patch.kernels.kv_layout import HND, LayerGroup, Plan, Side, Topology  # noqa: E402


def test_descriptors_of_a_block():
    """K and V once each; token by token only where decode takes some heads of a prefill rank."""
    assert planned(topology(4, 2, 8)).descriptors_per_block == 2
    assert planned(topology(2, 2, 8)).descriptors_per_block == 2
    assert planned(topology(2, 4, 8)).descriptors_per_block == 2 * 128
    assert planned(topology(2, 4, 8, layout=HND)).descriptors_per_block == 2
    assert planned(topology(2, 4, 1)).descriptors_per_block == 2


def addresses(plan: Plan, pairs, prefill: int = 0, decode: int = 0, **options):
    sides = plan.topology.prefill.regions(prefill), plan.topology.decode.regions(decode)
    bases = {
        f"{name}_bases": [(i + 1) << 30 for i in range(len(sizes))]
        for name, sizes in zip(("prefill", "decode"), sides, strict=True)
    }
    return kv_layout.descriptors(plan, prefill, decode, pairs, **{**bases, **options})


def test_neighbouring_blocks_are_one_range():
    plan = planned(topology(1, 1, 8))
    pairs = kv_layout.match_blocks(plan.topology, [4, 5, 6, 9], [1, 2, 3, 4])
    found = addresses(plan, pairs)
    block = 128 * 8 * 128 * 2
    assert found.lists()[2] == [3 * block, block] * 8
    assert found.total_bytes == 4 * block * 8
    assert len(found) == 16
    assert found.local[0] == (1 << 30) + block
    assert found.remote[0] == (1 << 30) + 4 * block
    pushed = addresses(planned(topology(1, 1, 8), "push"), pairs)
    assert pushed.lists() == (found.remote.tolist(), found.local.tolist(), found.lengths.tolist())


def test_combined_blocks_are_one_range():
    plan = planned(topology(2, 2, 8, combined=True))
    pairs = kv_layout.match_blocks(plan.topology, [4, 5, 6], [1, 2, 3])
    assert len(addresses(plan, pairs)) == 4
    strides = [2 * 128 * 4 * 128 * 2 + 64] * 4
    assert len(addresses(plan, pairs, prefill_strides=strides)) == 12


def test_shards_are_a_range_a_block():
    plan = planned(topology(4, 1, 8))
    pairs = kv_layout.match_blocks(plan.topology, [4, 5, 6], [1, 2, 3])
    assert len(addresses(plan, pairs, prefill=3)) == 3 * 2 * 4


def test_the_last_blocks_are_decodes():
    plan = planned(topology(1, 1, 8))
    pairs = kv_layout.match_blocks(plan.topology, [7, 8, 9], [3])
    assert (pairs.prefill_block.tolist(), pairs.decode_block.tolist()) == ([9], [3])
    nothing = kv_layout.match_blocks(plan.topology, [7, 8, 9], [])
    assert len(addresses(plan, nothing)) == 0
    assert addresses(plan, nothing).lists() == ([], [], [])


def test_blocks_behind_the_prompt_are_not_moved():
    """A block that prefill keeps for drafts shifts what "the last ones" are."""
    given = topology(1, 1, 8)
    pairs = kv_layout.match_blocks(given, [7, 8, 9], [3, 4], tokens=256)
    assert (pairs.prefill_block.tolist(), pairs.decode_block.tolist()) == ([7, 8], [3, 4])
    pairs = kv_layout.match_blocks(given, [7, 8, 9], [3, 4], tokens=256, cached_blocks=1)
    assert (pairs.prefill_block.tolist(), pairs.decode_block.tolist()) == ([8], [3])


def test_blocks_of_two_sizes():
    given = changed(topology(1, 1, 8), {"block_size": 32})
    pairs = kv_layout.match_blocks(given, [9, 8, 7, 6, 5], [3], tokens=150)
    assert pairs.prefill_block.tolist() == [5]
    assert (pairs.decode_block.tolist(), pairs.decode_unit.tolist()) == ([3], [0])
    pairs = kv_layout.match_blocks(given, [9, 8, 7, 6, 5], [3, 2], tokens=150)
    assert pairs.prefill_block.tolist() == [9, 8, 7, 6, 5]
    assert pairs.decode_block.tolist() == [3, 3, 3, 3, 2]
    assert pairs.decode_unit.tolist() == [0, 1, 2, 3, 0]
    given = changed(topology(1, 1, 8), decode={"block_size": 64})
    pairs = kv_layout.match_blocks(given, [9, 8], [3, 2], tokens=200)
    assert (pairs.prefill_block.tolist(), pairs.prefill_unit.tolist()) == ([8, 8], [0, 1])


@pytest.mark.parametrize(
    ("blocks", "options", "found"),
    [
        (([1], [2, 3]), {}, "decode wants 2"),
        (([1, 2], [3, 3]), {}, "written twice"),
        (([1, -2], [3]), {}, "at least 0"),
        (([1], [3]), {"tokens": 129}, "129 tokens are 2 blocks of 128; prefill gave 1"),
        (([1, 2], [3]), {"tokens": 129, "cached_blocks": 3}, "and has 3"),
    ],
)
def test_blocks_that_do_not_belong_together(blocks, options, found):
    with pytest.raises(ValueError, match=found):
        kv_layout.match_blocks(topology(1, 1, 8), *blocks, **options)


def test_two_block_sizes_need_the_length_of_the_prompt():
    with pytest.raises(ValueError, match="32 tokens in prefill and 128 in decode"):
        kv_layout.match_blocks(changed(topology(1, 1, 8), {"block_size": 32}), [1, 2], [3])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"prefill_bases": [0] * 7}, "prefill rank has 8 regions by the plan; 7 addresses"),
        ({"decode_strides": [1] * 8}, "Blocks of the decode rank are"),
        ({"prefill_num_blocks": 9}, "Block 9 is not on the prefill side: it has 9"),
        ({"decode_num_blocks": 2}, "Block 2 is not on the decode side: it has 2"),
    ],
)
def test_addresses_that_do_not_fit_the_plan(options, found):
    plan = planned(topology(1, 1, 8))
    pairs = kv_layout.match_blocks(plan.topology, [8, 9], [1, 2])
    with pytest.raises(ValueError, match=found):
        addresses(plan, pairs, **options)


def test_addresses_above_half_of_memory():
    """Of 48 bits and more, as an NPU's are."""
    plan = planned(topology(1, 1, 8))
    pairs = kv_layout.match_blocks(plan.topology, [0], [0])
    base = (1 << 62) + 64
    found = addresses(plan, pairs, prefill_bases=[base] * 8)
    assert found.lists()[1] == [base] * 8


def test_uneven_blocks_and_many_of_them_are_quick():
    """A 128k prompt in 64 layers; lists of ranges are made while a request waits."""
    group = LayerGroup(64, 8, (128, 128))
    plan = planned(Topology(Side((group,), 4), Side((group,), 2)))
    ids = np.random.default_rng(0).permutation(4096)[:1024]
    start = time.process_time()
    pairs = kv_layout.match_blocks(plan.topology, ids.tolist(), ids[::-1].tolist())
    found = addresses(plan, pairs)
    assert len(found) == 1024 * 128
    assert time.process_time() - start < 5


def test_batches_are_the_lists_in_parts():
    plan = planned(topology(2, 4, 8))
    pairs = kv_layout.match_blocks(plan.topology, [4, 5, 6], [1, 2, 3])
    found = addresses(plan, pairs)
    parts = list(found.batches(1000))
    assert [len(part[0]) for part in parts] == [1000, 1000, 1000, 72]
    joined = tuple([n for part in parts for n in part[i]] for i in range(3))
    assert joined == found.lists()
    assert max(len(part[2]) for part in found.batches()) <= 256
    assert list(addresses(plan, kv_layout.match_blocks(plan.topology, [4], [])).batches()) == []

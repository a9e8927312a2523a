"""Heads of tokens through a buffer: the same bytes as without, in far fewer ranges."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("numpy", reason="numpy is not installed")

import kv_topologies as topologies  # noqa: E402
import kv_world as world  # noqa: E402

from ascend_patch.kernels import kv_layout  # noqa: E402
from ascend_patch.kernels.kv_layout import HND, NHD, LayerGroup, Side, Topology  # noqa: E402

FEWER = [(1, 2), (1, 4), (2, 4), (2, 8), (4, 16), (3, 6), (1, 3), (2, 3), (4, 6)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("direction", ["pull", "push"])
@pytest.mark.parametrize("sizes", FEWER, ids=str)
def test_what_arrives_is_what_decode_computes(sizes, direction, seed):
    """For buffers that hold one block, a few, and all."""
    random = Random(seed)
    met = 0
    for heads in (h for h in (4, 6, 8, 12, 16) if all(h % tp == 0 for tp in sizes)):
        for scale in (1, 3, 1000):
            trial = topologies.draw(*sizes, heads, random, layouts=((NHD, NHD),))
            plan = kv_layout.plan_transfers(trial.topology, direction=direction, turn=trial.turn)
            if isinstance(plan, kv_layout.Refusal):
                continue
            buffer = kv_layout.least_staging(plan) * scale or 16
            rest = trial.tokens, trial.cached, trial.seed
            assert world.fault(trial.topology, plan, *rest, buffer) is None, trial
            met += kv_layout.least_staging(plan) > 0
    assert met or direction == "push"


def test_any_topology_may_have_a_buffer(seed):
    """Where nothing goes through it nothing changes."""
    random, met = Random(seed), 0
    for heads, prefill in itertools.product((1, 4, 6, 8), topologies.RANKS):
        decode = random.choice(topologies.compatible(heads))
        trial = topologies.draw(prefill, decode, heads, random)
        plan = kv_layout.plan_transfers(trial.topology, direction=trial.direction)
        if isinstance(plan, kv_layout.Refusal):
            continue
        buffer = max(16, kv_layout.least_staging(plan))
        rest = trial.tokens, trial.cached, trial.seed
        assert world.fault(trial.topology, plan, *rest, buffer) is None, trial
        met += 1
    assert met > 10


def plan_of(direction: str, *tp: int, layout: str = NHD, heads: int = 8) -> kv_layout.Plan:
    group = LayerGroup(2, heads, (128, 128))
    sides = (Side((group,), n, layout=layout) for n in tp)
    plan = kv_layout.plan_transfers(Topology(*sides), direction=direction)
    assert isinstance(plan, kv_layout.Plan)
    return plan


def rounds(plan: kv_layout.Plan, blocks: list[int], size: int) -> list[kv_layout.Round]:
    pairs = kv_layout.match_blocks(plan.topology, blocks, list(range(len(blocks))))
    bases = {
        "prefill_bases": [i << 30 for i in range(4)],
        "decode_bases": [i << 30 for i in range(4)],
    }
    return list(
        kv_layout.staged_rounds(
            plan, 0, 0, pairs, **bases, staging_base=1 << 40, staging_bytes=size
        )
    )


@pytest.mark.parametrize(("direction", "heads_moved"), [("pull", 8), ("push", 4)])
def test_a_block_is_one_range_instead_of_one_for_each_token(direction, heads_moved):
    """Pulled, it is all of prefill's heads; packed and pushed, decode's alone."""
    plan = plan_of(direction, 1, 2)
    [one] = rounds(plan, [9, 3, 5], 1 << 30)
    block = 128 * heads_moved * 128 * 2
    assert kv_layout.least_staging(plan) >= block - (128 * 4 if direction == "pull" else 0) * 2
    # Scattered blocks; what is packed may join where decode's blocks are neighbours.
    assert len(one.ranges) == (4 * 3 if direction == "pull" else 4)
    moved = one.ranges.total_bytes
    assert moved == pytest.approx(4 * 3 * block, rel=0.01)
    pairs = kv_layout.match_blocks(plan.topology, [9, 3, 5], [0, 1, 2])
    places = {"prefill_bases": [0] * 4, "decode_bases": [0] * 4}
    without = kv_layout.descriptors(plan, 0, 0, pairs, **places)
    assert len(without) == 4 * 3 * 128
    assert len(kv_layout.descriptors(plan, 0, 0, pairs, **places, staged=True)) == 0


def test_rounds_fill_the_buffer():
    plan = plan_of("pull", 1, 2)
    size = 5 * kv_layout.least_staging(plan)
    found = rounds(plan, list(range(0, 14, 2)), size)
    assert [sum(len(c.blocks) for c in one.copies) for one in found] == [5] * 5 + [3]
    for one in found:
        assert (one.ranges.local >= 1 << 40).all()
        assert (one.ranges.local + one.ranges.lengths <= (1 << 40) + size).all()


@pytest.mark.parametrize("direction", ["pull", "push"])
@pytest.mark.parametrize(
    ("tp", "layout", "heads"),
    [((2, 1), NHD, 8), ((2, 2), NHD, 8), ((1, 2), HND, 8), ((2, 4), NHD, 1)],
)
def test_other_ratios_need_no_buffer(tp, layout, heads, direction):
    plan = plan_of(direction, *tp, layout=layout, heads=heads)
    assert kv_layout.least_staging(plan) == 0
    assert rounds(plan, [1, 2], 16) == []


def test_a_buffer_that_is_too_small():
    plan = plan_of("push", 1, 2)
    with pytest.raises(ValueError, match="has 131056 bytes; a block takes 131072"):
        rounds(plan, [1], 131056)


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_copy_of_blocks_in_another_order_is_seen(direction, seed, monkeypatch):
    real = kv_layout.copy_staged

    def reordered(one, regions, staging):
        parts = [replace(c, blocks=c.blocks[::-1].copy()) for c in one.copies]
        real(replace(one, copies=tuple(parts)), regions, staging)

    plan = plan_of(direction, 1, 2)
    assert world.fault(plan.topology, plan, 200, 0, seed, 1 << 22) is None
    monkeypatch.setattr(kv_layout, "copy_staged", reordered)
    assert world.fault(plan.topology, plan, 200, 0, seed, 1 << 22) is not None


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_caches_as_they_are(direction, seed):
    """Of bfloat16, in five dimensions: the copy looks at their memory alone."""
    plan = plan_of(direction, 1, 2)
    generator = torch.Generator().manual_seed(seed)
    side = plan.topology.decode if direction == "pull" else plan.topology.prefill
    heads = 4 if direction == "pull" else 8
    shape = (2, 6, side.block_size, heads, 128)
    layers = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]
    regions = [part for layer in layers for part in layer.unbind(0)]
    before = [x.clone() for x in regions]
    buffer = torch.zeros(1 << 24, dtype=torch.uint8)
    [one] = rounds(plan, [4, 1], 1 << 24)
    if direction == "pull":
        buffer.random_(0, 255, generator=generator)
    kv_layout.copy_staged(one, regions, buffer)
    for part in one.copies:
        items = buffer[part.staging_offset :]
        room, step = part.staging_steps
        for i, block in enumerate(part.blocks.tolist()):
            for token in range(side.block_size):
                at = i * room + token * step
                packed = items[at : at + part.length].view(torch.bfloat16).view(-1, 128)
                held = regions[part.region][block, token]
                first = 0 if direction == "pull" else part.offset // 256
                assert torch.equal(
                    held[first : first + 4].view(torch.int16), packed.view(torch.int16)
                )
    if direction == "pull":
        assert all(torch.equal(x[2:], y[2:]) for x, y in zip(regions, before, strict=True))

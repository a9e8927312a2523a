"""Any topology: what the plan moves is what decode computes itself, or a row of the table."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import kv_topologies as topologies  # noqa: E402
import kv_world as world  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels import kv_layout  # noqa: E402
from ascend_patch.kernels.kv_layout import HND, NHD, LayerGroup, Side, Topology  # noqa: E402

POWERS = (1, 2, 4, 8, 16)
ROWS = {row.name for row in kv_layout.REFUSALS}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outcome(trial: topologies.Trial) -> str:
    """ "moved", or the row that refuses; fails where bytes are wrong or a refusal is unjust."""
    topology = trial.topology
    plan = kv_layout.plan_transfers(topology, direction=trial.direction, turn=trial.turn)
    served = topologies.can_be_served(topology)
    if isinstance(plan, kv_layout.Refusal):
        assert not served, f"{plan.sentence} {trial}"
        assert plan.name in ROWS
        assert topology.ratio in plan.sentence
        return plan.name
    assert served, f"not refused: {trial}"
    wrong = world.fault(topology, plan, trial.tokens, trial.cached, trial.seed)
    assert wrong is None, f"{wrong}: {trial}"
    assert_bounded(plan)
    return "moved"


def assert_bounded(plan: kv_layout.Plan) -> None:
    prefill, decode = plan.topology.prefill, plan.topology.decode
    units = max(1, decode.block_size // prefill.block_size)
    heads = max(decode.heads(group, 0).count for group in decode.groups)
    parts = max(len(group.widths) for group in decode.groups)
    assert plan.descriptors_per_block <= parts * max(decode.block_size, heads * units)


def test_every_pair_of_tp_sizes_and_heads(seed):
    """16 * 16 * 7 of them three times; everything else is drawn anew each time."""
    random = Random(seed)
    found: Counter[str] = Counter()
    for _ in range(3):
        for sizes in itertools.product(topologies.RANKS, topologies.RANKS, topologies.HEADS):
            found[outcome(topologies.draw(*sizes, random))] += 1
    total = sum(found.values())
    refused = {name: count for name, count in found.items() if name != "moved"}
    share = sum(refused.values()) / total
    print(f"{total} topologies, {share:.1%} refused: {refused}")
    assert total >= 5000
    assert set(refused) <= {"heads", "block size", "layout"}
    assert found["moved"] > 500


def test_every_pair_that_vllm_can_load(seed):
    """Of block sizes and layouts that go together none is refused."""
    random = Random(seed)
    count = 0
    for heads in topologies.HEADS:
        sizes = topologies.compatible(heads)
        for prefill, decode in itertools.product(sizes, sizes):
            for layouts in ((NHD, NHD), (HND, HND), (HND, NHD)):
                trial = topologies.draw(
                    prefill, decode, heads, random, equal_blocks=1.0, layouts=(layouts,)
                )
                groups = [g for g in trial.topology.decode.groups if g.name == "model"]
                trial = replace(trial, topology=only(trial.topology, tuple(groups)))
                assert outcome(trial) == "moved"
                count += 1
    print(f"{count} topologies, none refused")
    assert count > 1000


def only(topology: Topology, groups: tuple[LayerGroup, ...]) -> Topology:
    """The topology without its other layers."""
    sides = (
        replace(side, groups=groups, pp=min(side.pp, groups[0].layers), stages=())
        for side in (topology.prefill, topology.decode)
    )
    return Topology(*sides)


@pytest.mark.parametrize("direction", ["pull", "push"])
def test_the_set_that_must_be_answered(direction, seed):
    """All of P and D in powers of two up to 16, heads that divide or replicate: no refusal."""
    count = 0
    for prefill, decode, heads in itertools.product(POWERS, POWERS, POWERS):
        for layout, combined in itertools.product((NHD, HND), (False, True)):
            group = LayerGroup(2, heads, (2, 2))
            sides = (Side((group,), tp, 1, 4, layout, combined) for tp in (prefill, decode))
            topology = Topology(*sides)
            plan = kv_layout.plan_transfers(topology, direction=direction)
            assert isinstance(plan, kv_layout.Plan), plan
            assert world.fault(topology, plan, 11, 1, seed + count) is None
            count += 1
    assert count == 500


def test_latents_are_answered_for_any_ranks(seed):
    """MLA: one head that all ranks hold, P and D from 1 to 16."""
    for prefill, decode in itertools.product(topologies.RANKS, topologies.RANKS):
        group = LayerGroup(2, 1, (4, 1))
        topology = Topology(*(Side((group,), tp, block_size=4) for tp in (prefill, decode)))
        plan = kv_layout.plan_transfers(topology, direction="pull", turn=seed)
        assert world.fault(topology, plan, 7, 0, seed) is None
        assert all(len(plan.sources(rank)) == 1 for rank in range(decode))
        most = max(len(plan.targets(rank)) for rank in range(prefill))
        assert most == -(-decode // prefill), "the pulls are not spread over the replicas"


trials = st.builds(
    lambda prefill, decode, heads, seed: topologies.draw(prefill, decode, heads, Random(seed)),
    st.sampled_from(topologies.RANKS),
    st.sampled_from(topologies.RANKS),
    st.sampled_from(topologies.HEADS),
    st.integers(0, 2**31),
)


@settings(max_examples=300, deadline=None, database=None, print_blob=True)
@given(trial=trials)
def test_any_topology_is_moved_or_refused(trial):
    outcome(trial)


def mutate(plan: kv_layout.Plan, change) -> kv_layout.Plan:
    """The plan with ``change`` done to the runs of its first piece."""
    first = plan.transfers[0]
    piece = replace(first.pieces[0], runs=change(first.pieces[0].runs))
    transfer = replace(first, pieces=(piece, *first.pieces[1:]))
    return with_transfers(plan, (transfer, *plan.transfers[1:]))


def with_transfers(plan: kv_layout.Plan, transfers) -> kv_layout.Plan:
    """Another plan, whose transfers are not computed from its topology."""
    changed = replace(plan)
    by_pair = {(t.prefill_rank, t.decode_rank): t for t in transfers}
    vars(changed).update(_by_pair=by_pair, transfers=tuple(transfers))
    return changed


def run(**change):
    """A mutation of the first run."""

    def apply(runs):
        moved = {name: getattr(runs[0], name) + by for name, by in change.items()}
        return (replace(runs[0], **moved), *runs[1:])

    return apply


MUTANTS = {
    "a source offset": run(prefill_offset=2),
    "a target offset": run(decode_offset=2),
    "a length": run(length=-2),
    "a missing range": run(count=-1),
    "a step": run(prefill_step=2, count=1),
    "a missing part": lambda runs: runs[1:],
    "a part twice": lambda runs: (*runs, runs[0]),
    "K for V": lambda runs: (replace(runs[0], prefill_region=runs[1].prefill_region), *runs[1:]),
}


@pytest.mark.parametrize("sizes", [(4, 1, 4), (2, 2, 4), (1, 2, 4), (8, 4, 2)], ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_plan_is_seen(mutant, sizes, seed):
    prefill, decode, heads = sizes
    group = LayerGroup(2, heads, (2, 2))
    topology = Topology(*(Side((group,), tp, block_size=4) for tp in (prefill, decode)))
    plan = kv_layout.plan_transfers(topology, direction="pull")
    assert world.fault(topology, plan, 11, 0, seed) is None
    assert world.fault(topology, mutate(plan, MUTANTS[mutant]), 11, 0, seed) is not None


@pytest.mark.parametrize("sizes", [(4, 1, 4), (2, 2, 4), (4, 2, 4)], ids=str)
def test_swapped_ranks_are_seen(sizes, seed):
    """As if two prefill ranks had each other's addresses: two heads are swapped."""
    prefill, decode, heads = sizes
    group = LayerGroup(1, heads, (2, 2))
    topology = Topology(*(Side((group,), tp, block_size=4) for tp in (prefill, decode)))
    plan = kv_layout.plan_transfers(topology, direction="pull")
    swapped = {0: 1, 1: 0}
    transfers = [
        replace(t, prefill_rank=swapped.get(t.prefill_rank, t.prefill_rank)) for t in plan.transfers
    ]
    wrong = with_transfers(plan, transfers)
    assert world.fault(topology, wrong, 11, 0, seed) is not None


def test_a_merge_left_out_is_seen(seed, monkeypatch):
    group = LayerGroup(1, 4, (2, 2))
    topology = Topology(*(Side((group,), tp, block_size=4) for tp in (4, 1)))
    plan = kv_layout.plan_transfers(topology, direction="pull")
    monkeypatch.setattr(kv_layout.Plan, "merges", lambda self, rank: ())
    assert "bytes are wrong" in world.fault(topology, plan, 11, 0, seed)

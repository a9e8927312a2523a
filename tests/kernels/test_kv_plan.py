"""Plans by example: known faults, refusals, rank choice, stages, drafts, blocks, descriptors."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("numpy", reason="numpy is not installed")

from kv_topologies import changed, planned, topology

from ascend_patch.kernels import kv_layout
from ascend_patch.kernels.kv_layout import (
    HND,
    LayerGroup,
    Refusal,
    Side,
    Topology,
)

DRAFT = LayerGroup(1, 4, (128, 128), "eagle", draft=True)


def refused(given: Topology) -> Refusal:
    refusal = kv_layout.plan_transfers(given, direction="pull")
    assert isinstance(refusal, Refusal)
    return refusal


@pytest.mark.parametrize(("prefill", "decode"), [(8, 3), (6, 4)])
def test_ranks_that_leave_heads_out_are_refused(prefill, decode):
    """vllm-ascend gives decode rank 2 of 3 prefill ranks 4 and 5, and nobody ranks 6 and 7."""
    refusal = refused(topology(prefill, decode, 8))
    assert refusal.name == "heads"
    assert f"prefill TP {prefill} -> decode TP {decode}: 8 KV heads" in refusal.sentence


def test_ranks_that_overlap_in_part_are_right():
    """6 ranks of two heads, 4 ranks of three: each takes one rank whole and half of another."""
    plan = planned(topology(6, 4, 12))
    assert [plan.sources(rank) for rank in range(4)] == [(0, 1), (1, 2), (3, 4), (4, 5)]
    shards = [[merge.shards for merge in plan.merges(rank)] for rank in range(4)]
    assert shards == [[(2, 1)], [(1, 2)], [(2, 1)], [(1, 2)]]


BASE = topology(4, 2, 8)
ROWS = {
    "sizes": (changed(BASE, {"block_size": 0}), "below 1"),
    "KV cache groups": (
        changed(BASE, decode={"kv_cache_groups": 2}),
        "prefill has 1, decode 2",
    ),
    "context parallel": (changed(BASE, {"context_parallel": 4}), "prefill has 4, decode 1"),
    "storage": (changed(BASE, decode={"storage": "NZ"}), "prefill has plain, decode NZ"),
    "dtype": (
        changed(BASE, {"dtype": "float16"}),
        "prefill has float16 of 2 bytes, decode bfloat16 of 2 bytes",
    ),
    "int8": (
        changed(
            BASE,
            {"dtype": "int8", "itemsize": 1},
            {"dtype": "int8", "itemsize": 1},
        ),
        "int8",
    ),
    "layers": (
        changed(BASE, decode={"groups": (LayerGroup(5, 8, (128, 128)),)}),
        "prefill has 4 layers of 8 KV heads",
    ),
    "heads": (topology(3, 2, 8), "8 KV heads of layers 'model'"),
    "stages": (
        changed(BASE, {"pp": 2, "stages": (3, 2)}),
        "the 2 pipeline stages of prefill hold (3, 2) layers, and the model has 4",
    ),
    "block size": (changed(BASE, {"block_size": 48}), "prefill has 48, decode 128"),
    "layout": (
        changed(BASE, decode={"layout": HND}),
        "prefill has NHD with 2 KV heads on a rank, decode HND with 4",
    ),
    "chosen ranks": (
        replace(BASE, chosen=((0, 1), (2,))),
        "decode rank 1 needs KV heads 4 to 7 of layers 'model', and prefill ranks (2,) lack [6, 7]",
    ),
}


def test_every_row_of_the_table_has_an_example():
    assert list(ROWS) == [row.name for row in kv_layout.REFUSALS]


@pytest.mark.parametrize("name", ROWS)
def test_a_refusal_names_both_sides(name):
    given, found = ROWS[name]
    refusal = refused(given)
    assert refusal.name == name
    assert refusal.sentence.startswith("prefill TP ")
    assert found in refusal.sentence
    assert refusal.sentence.endswith(".")
    assert kv_layout.refuse(BASE) is None


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (changed(BASE, {"layout": "NZ"}), "is 'NZ', not NHD or HND"),
        (changed(BASE, decode={"groups": (*BASE.decode.groups, DRAFT)}), "1 layers 'eagle'"),
        (changed(BASE, {"groups": (DRAFT,)}), "decode has 4 layers 'model' and prefill has"),
        (changed(BASE, {"groups": (DRAFT, *BASE.prefill.groups)}), "come before others"),
        (changed(BASE, {"groups": BASE.prefill.groups * 2}), "have one name"),
        (changed(BASE, {"pp": 5}), "do not fill the 5 pipeline stages"),
        (replace(BASE, chosen=((0, 1),)), "for 1 decode ranks, not 2"),
        (replace(BASE, chosen=((0, 1), (2, 7))), "(2, 7) of 4"),
    ],
)
def test_other_sentences_of_the_table(given, found):
    assert found in refused(given).sentence


def test_an_unknown_direction_is_an_error():
    with pytest.raises(ValueError, match="'pull' or 'push'"):
        kv_layout.plan_transfers(BASE, direction="fetch")


def test_who_talks_does_not_depend_on_the_direction():
    pull, push = (planned(BASE, direction) for direction in ("pull", "push"))
    assert pull.transfers == push.transfers
    assert [pull.sources(rank) for rank in range(2)] == [(0, 1), (2, 3)]
    assert [pull.targets(rank) for rank in range(4)] == [(0,), (0,), (1,), (1,)]


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_equal_sizes_are_one_to_one(heads):
    """With replicas too: as the host does it, so that an unpatched peer agrees."""
    plan = planned(topology(8, 8, heads))
    assert [plan.sources(rank) for rank in range(8)] == [(rank,) for rank in range(8)]
    assert plan.idle_prefill_ranks == ()


def test_requests_take_turns_on_replicas():
    """P 8 of 2 heads, D 2: each decode rank has four replicas to read from."""
    plans = [planned(topology(8, 2, 2), turn=turn) for turn in range(4)]
    assert sorted(plan.sources(0) for plan in plans) == [(0,), (1,), (2,), (3,)]
    assert sorted(plan.sources(1) for plan in plans) == [(4,), (5,), (6,), (7,)]
    assert all(len(plan.idle_prefill_ranks) == 6 for plan in plans)
    assert planned(topology(8, 2, 2), turn=8).transfers == plans[0].transfers


def test_a_host_that_chose_among_replicas_is_followed():
    """vllm-ascend's choice for P 8, D 2, 4 heads, request "req-1"."""
    given = replace(topology(8, 2, 4), chosen=((1, 3), (5, 7)))
    for turn in range(5):
        plan = planned(given, turn=turn)
        assert [plan.sources(rank) for rank in range(2)] == [(1, 3), (5, 7)]


def test_draft_layers_are_read_where_others_are_read_anyway():
    group = LayerGroup(4, 8, (128, 128))
    draft = LayerGroup(1, 1, (128, 128), "eagle", draft=True)
    given = Topology(*(Side((group, draft), tp) for tp in (8, 2)))
    for turn in range(8):
        plan = planned(given, turn=turn)
        assert plan.sources(0) == (0, 1, 2, 3)
        assert plan.sources(1) == (4, 5, 6, 7)


def test_drafts_are_on_the_last_stage_and_merged_by_their_own_heads():
    group = LayerGroup(5, 8, (128, 128))
    given = Topology(
        Side((group, DRAFT), 4, pp=2),
        Side((group, DRAFT), 2),
    )
    plan = planned(given)
    # Five layers on two stages: 3 and 2. Ranks 0 to 3 have no draft layer, 4 to 7 have.
    groups = {
        rank: [piece.group for t in plan.transfers if t.prefill_rank == rank for piece in t.pieces]
        for rank in (0, 4)
    }
    assert groups == {0: ["model"], 4: ["model", "eagle"]}
    assert plan.transfer(4, 0).pieces[0].layers == ((0, 6), (2, 8))
    assert plan.transfer(4, 0).pieces[1].layers == ((4, 10),)
    assert [(m.group, m.shards, m.regions) for m in plan.merges(0)] == [
        ("model", (2, 2), tuple(range(10))),
        ("eagle", (1, 1), (10, 11)),
    ]
    assert plan.transfer(0, 1) is None


def test_a_draft_model_that_prefill_has_alone_is_left():
    plan = planned(changed(BASE, {"groups": (*BASE.prefill.groups, DRAFT)}))
    assert {piece.group for t in plan.transfers for piece in t.pieces} == {"model"}


def test_stages_are_vllms():
    group = LayerGroup(7, 8, (128, 128))
    assert Side((group,), 1, pp=4).stage_layers == (2, 2, 2, 1)
    assert Side((group,), 1, pp=3).stage_layers == (2, 3, 2)
    assert Side((group,), 1, pp=2, stages=(1, 6)).stage_layers == (1, 6)


@pytest.mark.parametrize("sizes", [(4, 2), (2, 1), (2, 2), (2, 4)], ids=str)
def test_hnd_never_needs_a_merge(sizes):
    plan = planned(topology(*sizes, 8, layout=HND))
    assert all(plan.merges(rank) == () for rank in range(sizes[1]))
    assert plan.descriptors_per_block == 2


def test_nhd_blocks_of_one_head_are_hnd_blocks():
    given = changed(topology(8, 2, 8), decode={"layout": HND})
    assert planned(given).merges(0) == ()

"""core(): a GDN layer's steps of every kind give each token the result of its whole text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gdn_core_requests import Request, Sizes, Turn, World, joined, metadata_of

from ascend_patch.impl.gdn_core import core
from ascend_patch.kernels import dispatch

FLOAT32 = 2e-5
BFLOAT16 = 2e-2
PADDED_ROWS = 3


def step(world: World, turns: list[Turn], *, padding: int = 0) -> float:
    """Run a step, and return how far its results are from the oracle's, by their largest."""
    new = joined([turn.new for turn in turns])
    tokens = len(new) + PADDED_ROWS
    # Rows behind the batch, as a captured graph has them; what they hold must not matter.
    inputs = [
        torch.cat((x, x.new_full((PADDED_ROWS, x.shape[1]), torch.nan)))
        for x in (new.mixed, new.b, new.a)
    ]
    heads = (world.sizes.value_heads, world.sizes.value_size)
    out = torch.full((tokens, *heads), torch.nan, dtype=world.sizes.dtype)
    core(
        world.layer,
        *inputs,
        out,
        metadata_of(turns, padding=padding),
        conv_state=world.conv_cache.transpose(-1, -2),
        ssm_state=world.states,
        state_layout=world.sizes.layout,
    )
    assert out[len(new) :].isnan().all(), "rows behind the batch were written"
    expected = torch.cat([turn.expected for turn in turns])
    found = out[: len(new)].double()
    return float((found - expected).abs().max() / expected.abs().max())


def prefilled(world: World, *lengths: int) -> list[Request]:
    """Requests that have had their prompts, in one batch."""
    requests = [world.request() for _ in lengths]
    turns = [r.takes(n) for r, n in zip(requests, lengths, strict=True)]
    assert step(world, turns) < FLOAT32
    for turn in turns:
        turn.keep(len(turn.new))
    return requests


@pytest.fixture(params=["VK", "KV"])
def world(request, seed) -> World:
    return World(Sizes(layout=request.param), seed)


@pytest.fixture
def drafting(seed) -> World:
    return World(Sizes(drafts=2), seed)


def test_prompts_of_any_length_in_one_batch(world) -> None:
    assert step(world, [world.request().takes(n) for n in (1, 63, 64, 65, 2, 130)]) < FLOAT32


def test_prompts_in_parts_of_any_length(world) -> None:
    """The second part begins with what the first left: of its convolution, and of its state."""
    for first, second in ((1, 1), (1, 70), (2, 2), (64, 64), (65, 3), (70, 1)):
        (request,) = prefilled(world, first)
        assert step(world, [request.takes(second), world.request().takes(2)]) < FLOAT32


def test_decode_goes_on_from_prefill(world) -> None:
    requests = prefilled(world, 1, 3, 66)
    for _ in range(5):
        turns = [request.takes(1) for request in requests]
        assert step(world, turns) < FLOAT32
        for turn in turns:
            turn.keep(1)


def test_decode_beside_prefill(world) -> None:
    one, other = prefilled(world, 5, 65)
    turns = [one.takes(1), world.request().takes(70), other.takes(1), world.request().takes(1)]
    assert step(world, turns) < FLOAT32
    for turn in turns:
        turn.keep(len(turn.new))
    assert step(world, [turn.request.takes(1) for turn in turns]) < FLOAT32


def test_requests_that_only_pad_a_batch(world) -> None:
    (request,) = prefilled(world, 7)
    turns = [request.takes(1), world.request().takes(3)]
    assert step(world, turns, padding=3) < FLOAT32


def test_slots_of_other_requests_are_left_alone(world) -> None:
    before = [x.clone() for x in (world.conv_cache, world.states)]
    turns = [world.request().takes(n) for n in (3, 70)]
    step(world, turns)
    used = torch.zeros(world.sizes.slots, dtype=torch.bool)
    used[[turn.request.slots[0] for turn in turns]] = True
    for cache, held in zip((world.conv_cache, world.states), before, strict=True):
        assert cache[used].isfinite().all()
        torch.testing.assert_close(cache[~used], held[~used], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [(3, 3), (1, 3, 2)])
def test_drafts_that_are_accepted_in_part(drafting, lengths) -> None:
    """Three steps, with every number of accepted tokens that there can be."""
    requests = prefilled(drafting, *(4 + i for i in range(len(lengths))))
    for round_ in range(3):
        turns = [r.takes(n, drafts=True) for r, n in zip(requests, lengths, strict=True)]
        assert step(drafting, turns) < FLOAT32
        for i, turn in enumerate(turns):
            turn.keep(1 + (round_ + i) % len(turn.new))


def test_drafts_beside_prompts_and_their_last_token(drafting) -> None:
    """A mixed batch in an order of its own: each takes what is its own of gates and caches."""
    requests = prefilled(drafting, 6, 9, 70)
    for accepted in (2, 1, 3):
        turns = [
            drafting.request().takes(66),
            requests[0].takes(3, drafts=True),
            requests[2].takes(1),
            requests[1].takes(3, drafts=True),
        ]
        assert step(drafting, turns) < FLOAT32
        for turn in turns:
            turn.keep(accepted if turn.drafts else len(turn.new))


def test_bfloat16_with_states_in_either_precision(seed) -> None:
    for state_dtype in (torch.float32, torch.bfloat16):
        sizes = Sizes(dtype=torch.bfloat16, state_dtype=state_dtype)
        world = World(sizes, seed)
        turns = [world.request().takes(n) for n in (1, 65, 100)]
        assert step(world, turns) < BFLOAT16
        for turn in turns:
            turn.keep(len(turn.new))
        assert step(world, [turn.request.takes(1) for turn in turns]) < BFLOAT16


def test_a_bias_and_no_grouped_heads(seed) -> None:
    """Shapes decide; nothing is taken from what Qwen3-Next happens to have."""
    world = World(replace(Sizes(), value_heads=2, key_size=128, value_size=64), seed)
    assert step(world, [world.request().takes(n) for n in (1, 65)]) < FLOAT32


def test_what_runs_are_the_bundled_kernels(world) -> None:
    seen: list[str] = []
    before = dispatch.set_observer(seen.append)
    try:
        (request,) = prefilled(world, 5)
        step(world, [request.takes(1)])
    finally:
        dispatch.set_observer(before)
    assert seen == [
        "causal_conv1d",
        "fused_gating",
        "chunk_gated_delta_rule",
        "causal_conv1d_update",
        "recurrent_gated_delta_rule",
    ]


def test_prefill_without_chunk_tables_is_an_error(world) -> None:
    turn = world.request().takes(3)
    metadata = metadata_of([turn])
    del metadata.ascend_patch_chunks
    new, out = turn.new, torch.empty(3, world.sizes.value_heads, world.sizes.value_size)
    with pytest.raises(RuntimeError, match="no chunk tables"):
        core(
            world.layer,
            new.mixed,
            new.b,
            new.a,
            out,
            metadata,
            conv_state=world.conv_cache.transpose(-1, -2),
            ssm_state=world.states,
            state_layout=world.sizes.layout,
        )


@pytest.mark.parametrize("wrong", ["convolution", "state", "gates"])
def test_the_oracle_notices(world, wrong) -> None:
    """What a lost cache or a closed gate looks like, so that the limits above mean something."""
    (request,) = prefilled(world, 40)
    turn = request.takes(3)
    if wrong == "convolution":
        world.conv_cache.zero_()
    elif wrong == "state":
        world.states.zero_()
    else:
        turn.new.b.fill_(-1e4)
    assert step(world, [turn]) > 100 * FLOAT32

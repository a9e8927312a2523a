"""Whatever the batch, what the route computes on the operator surface is attention, or refused."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

import attention_batches as batches  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels.attention.attend import Batch  # noqa: E402
from ascend_patch.kernels.attention.case import HOST  # noqa: E402
from ascend_patch.kernels.attention.route import route  # noqa: E402
from ascend_patch.kernels.attention.table import ROWS  # noqa: E402
from ascend_patch.kernels.npu_ops import surface  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402

SWEEP = 3000
MOST_REFUSED = 0.10


pytestmark = pytest.mark.usefixtures("on_the_surface")


def check(asked):
    """The route's operator; raises AssertionError where the answer is wrong."""
    found = route(asked.case)
    if found.operator != HOST:
        made = batches.make(asked)
        wrong = made.judge(made.answer(found))
        assert not wrong, f"{wrong}\n{asked}\n{found}"
    return found


def test_random_batches(seed, capsys):
    """At most a tenth is left to the host; the share is printed."""
    chosen = random.Random(seed)
    refused: dict[str, int] = {}
    answered: dict[str, int] = {}
    for _ in range(SWEEP):
        found = check(batches.draw(chosen))
        counted = refused if found.operator == HOST else answered
        counted[found.row] = counted.get(found.row, 0) + 1
    share = sum(refused.values()) / SWEEP
    with capsys.disabled():
        print(f"\n{SWEEP} batches, {share:.1%} refused: {refused}; answered: {answered}")
    assert share <= MOST_REFUSED
    rows = {row.name for row in ROWS}
    assert rows <= set(answered), f"no batch came to {rows - set(answered)}"


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(chosen=st.randoms(use_true_random=False))
def test_batches_that_hypothesis_makes_up(chosen):
    check(batches.draw(chosen))


@pytest.mark.parametrize(
    ("release", "cann"),
    [("2.7.1", "8.5"), ("2.8.0.post2", "8.5"), ("2.9.0", "9.0"), ("2.10.0", "9.1")],
)
def test_documentation_taken_by_its_word(seed, release, cann):
    """Two allowances are needed, and no other: head sizes, and float16 before CANN 9, in TND."""
    chosen = random.Random(seed)
    needed = ("float32", "tnd_head_size", *(["tnd_float16"] if cann == "8.5" else []))
    with surface.settings(release=release, cann=cann, strict=True, allow=needed):
        for _ in range(200):
            check(batches.draw(chosen))


@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("state", ["chunked", "decode"])
def test_a_prefix_that_all_requests_share(state, head_size, seed):
    """An operator counts a shared block for each request, and refuses more than a cache has."""
    queries = (1,) * 9 if state == "decode" else (2, 1, 0, 3, 1, 4, 1, 1, 2)
    asked = batches.Asked(
        state,
        queries,
        (64,) * 9,
        head_size=head_size,
        num_kv_heads=2,
        group=1,
        block_size=128 if head_size == 256 else 16,
        shared=tuple(range(1, 9)),
        seed=seed,
    )
    if head_size == 256:
        asked = replace(asked, contexts=(256,) * 9)
    made = batches.make(asked)
    # The blocks that nobody holds go, so that the cache has fewer than the requests count.
    used, places = made.table[:9].unique(return_inverse=True)
    made.key_cache, made.value_cache = made.key_cache[used], made.value_cache[used]
    made.table = places.view(made.table[:9].shape).int()
    assert sum(-(-n // asked.block_size) for n in asked.lens) > len(used)
    with surface.settings(forbid=("shared_blocks",)):
        assert not made.judge(made.answer(route(asked.case)))


def long_batches(seed):
    """Beyond the 2048 rows that the compressed masks have, and windows on both sides of that."""
    chosen = random.Random(seed)
    for window, causal, head_size in itertools.product(
        (None, 100, 2500), (True, False), (128, 256)
    ):
        yield batches.Asked(
            "chunked",
            (2200, 1, 3),
            (700, 2600, chosen.randint(2049, 2300)),
            causal=causal,
            head_size=head_size,
            window=window,
            block_size=128,
            layout=chosen.choice(batches.LAYOUTS),
            seed=chosen.randrange(2**31),
        )


@pytest.mark.parametrize("index", range(12))
def test_long_batches(index, seed):
    check(list(long_batches(seed))[index])


def some(count, seed, **wanted):
    """Batches of the kind that a control needs; ``wanted`` are fields that they are given."""
    chosen = random.Random(seed)
    for _ in range(count):
        queries = tuple(chosen.randint(1, 5) for _ in range(3))
        contexts = tuple(chosen.randint(8, 60) for _ in range(3))
        given = {"queries": queries, "contexts": contexts, "seed": chosen.randrange(2**31)}
        yield batches.Asked(**{"state": "chunked", **given, **wanted})


def caught(asked, mutated, batch=None):
    """Does a wrong route, or a wrong batch, give a wrong answer or an operator's error?"""
    check(asked)
    made = batches.make(asked)
    try:
        out = made.answer(mutated, batch and batch(made))
    except OperatorError:
        return True
    return bool(made.judge(out))


WINDOWED = {"window": 4, "head_size": 128}


def test_a_window_off_by_one_is_caught(seed):
    for by in (-1, 1):
        for asked in some(20, seed, **WINDOWED):
            right = route(asked.case)
            assert caught(asked, replace(right, pre_tokens=right.pre_tokens + by)), asked
        for asked in some(20, seed, window=4, head_size=256):
            right = route(asked.case)
            assert caught(asked, replace(right, pre_tokens=right.pre_tokens + by)), asked


def test_a_plain_causal_mask_in_place_of_a_band_is_caught(seed):
    for asked in some(20, seed, **WINDOWED):
        assert caught(asked, replace(route(asked.case), sparse_mode=3)), asked


def test_no_mask_in_place_of_a_causal_one_is_caught(seed):
    for asked in some(20, seed, queries=(2, 3), contexts=(9, 9)):
        assert caught(asked, replace(route(asked.case), sparse_mode=0, mask="none")), asked


def test_a_causal_mask_where_every_key_is_seen_is_caught(seed):
    for asked in some(20, seed, queries=(2, 3), contexts=(9, 9), causal=False):
        assert caught(asked, replace(route(asked.case), sparse_mode=3, mask="causal")), asked


def test_cumulative_lengths_of_a_paged_cache_are_caught(seed):
    def cumulative(made):
        batch = made.batch
        ends = list(itertools.accumulate(batch.seq_lens))
        return Batch(batch.query_ends, ends, batch.block_table, batch.num_tokens)

    for asked in some(20, seed):
        assert caught(asked, route(asked.case), cumulative), asked


def test_this_step_s_keys_in_place_of_the_cache_are_refused():
    """The defect that embeddings had: a cached prefix that no query saw."""
    asked = batches.Asked("cache_hit", (3, 2), (16, 0))
    made = batches.make(asked)
    with pytest.raises(ValueError, match="the state is not prefill"):
        made.answer(route(replace(asked, state="prefill", contexts=(0, 0)).case))

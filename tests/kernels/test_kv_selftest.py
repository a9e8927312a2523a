"""The suite of merge_head_shards_ for `ascend-patch verify` passes what is right, and only that."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.kv_layout import merge, merge_reference, selftest  # noqa: E402

SUITE = selftest.SUITES[0]


@pytest.mark.parametrize("case", SUITE.cases(True), ids=str)
def test_the_reference_is_right(case, seed):
    trial = SUITE.trial(case, seed, "cpu")
    assert [i.name for i in trial.candidates()] == ["reference"]
    assert trial.judged().wrong == ""


@pytest.mark.parametrize("case", SUITE.cases(False), ids=str)
def test_the_same_seed_is_the_same_call(case, seed):
    first, second = (SUITE.trial(case, seed, "cpu") for _ in range(2))
    assert first.block_ids == second.block_ids
    for a, b in zip(first.caches, second.caches, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def shards_reversed(call: merge.MergeCall) -> None:
    merge_reference.run(call)
    for cache in call.caches:
        cache[list(call.block_ids)] = cache[list(call.block_ids)].flip(2)


def nothing(call: merge.MergeCall) -> None:
    pass


def another_block(call: merge.MergeCall) -> None:
    merge_reference.run(call)
    other = min(set(range(len(call.caches[0]))) - set(call.block_ids))
    call.caches[-1][other] = call.caches[-1][call.block_ids[0]]


@pytest.mark.parametrize("run", [shards_reversed, nothing, another_block])
@pytest.mark.parametrize("case", SUITE.cases(False), ids=str)
def test_what_is_wrong_is_said(case, run, seed):
    dispatch.register(merge.OPERATOR, "cpu", dispatch.Implementation("wrong", run, priority=1))
    try:
        with dispatch.only("wrong"):
            verdict = SUITE.trial(case, seed, "cpu").judged()
    finally:
        dispatch.unregister(merge.OPERATOR, "cpu", "wrong")
    assert "bytes are not where they belong" in verdict.wrong

"""The gated delta rule's self-test: its oracle, its cases, and that it sees what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import gdn_oracle
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels import dispatch  # noqa: E402
from ascend_patch.kernels.gdn import cases, chunk, oracle, reference, selftest  # noqa: E402

CASES = (
    cases.ChunkCase(cases.RAGGED, tail=3, sliced=True),
    cases.ChunkCase((70, 0, 65), layout="KV", dtype="float16", decay=20.0, key_size=64),
    cases.ChunkCase((3, 130), states="initial", normalise=False, value_size=64),
    cases.ChunkCase((5, 64), states="none", state_dtype="bfloat16"),
)
[SUITE] = [suite for suite in selftest.SUITES if suite.operator == chunk.OPERATOR]


def trial(case: cases.ChunkCase, seed: int) -> selftest.ChunkTrial:
    return SUITE.trial(case, seed, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle_is_the_tests_own(case, seed):
    """Two recurrences, written apart: one in torch over sequences at once, one in numpy."""
    arguments = cases.make_inputs(case, seed)
    outs, finals, kept = oracle.recurrence(arguments)
    other = gdn_oracle.Case(
        case.lengths,
        **{name: getattr(case, name) for name in ("key_heads", "value_heads", "key_size")},
        value_size=case.value_size,
        layout=case.layout,
        states=case.states,
        normalise=case.normalise,
    )
    slots = arguments.get("state_indices", torch.arange(len(case.lengths))).tolist()
    carried = arguments.get("has_initial_state", torch.ones(len(slots))).bool().tolist()
    before = arguments.get("state", arguments.get("initial_state"))
    inputs = gdn_oracle.Inputs(other, arguments, before, slots, carried)
    wanted, states = gdn_oracle.recurrence(inputs)
    assert torch.allclose(outs, torch.from_numpy(wanted)[: len(outs)], rtol=1e-9, atol=1e-12)
    assert torch.allclose(finals, torch.from_numpy(states), rtol=1e-9, atol=1e-12)
    assert kept.tolist() == [slot >= 0 for slot in slots]


def test_every_case_has_a_name_of_its_own():
    everything = SUITE.cases(True)
    names = [str(case) for case in everything + cases.serving_cases()]
    assert len(set(names)) == len(names)
    assert {str(case) for case in SUITE.cases(False)} <= {str(case) for case in everything}
    for axis in ("dtype", "layout", "states", "state_dtype", "decay", "sliced", "normalise"):
        for group in (SUITE.cases(False), everything):
            assert len({getattr(case, axis) for case in group}) > 1, axis


def test_serving_batches_are_those_of_the_benchmarks():
    assert sum(cases.MIXED) == 8175
    found = cases.serving_cases()
    assert len(found) == 24
    assert {case.value_heads for case in found} == {4, 8, 16, 32}


@pytest.mark.parametrize("case", SUITE.cases(False), ids=str)
def test_the_reference_is_right(case, seed):
    verdict = trial(case, seed).judged()
    print(verdict)
    assert verdict.wrong == ""
    # It rounds its result once; where there is none, nothing is measured.
    assert verdict.ulps < 0.3
    assert (verdict.ulps > 0.1) == (sum(case.lengths) > 0)


FAULTS = {
    "beta forgotten": lambda call: replace(call, beta=torch.ones_like(call.beta)),
    "decay forgotten": lambda call: replace(call, g=torch.zeros_like(call.g)),
    "layout swapped": lambda call: replace(call, state_layout="KV"),
    "new sequences continued": lambda call: replace(call, has_initial_state=None),
    "scale forgotten": lambda call: replace(call, scale=1.0),
    "a token late": lambda call: replace(call, k=call.k.roll(1, 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, seed, monkeypatch):
    def run(call: chunk.Call) -> None:
        reference.run(FAULTS[fault](call))

    faulty = dispatch.Implementation("faulty", run, priority=99)
    dispatch.register(chunk.OPERATOR, "cpu", faulty)
    try:
        # Two of three carry a state: which ones is drawn, and one of them is enough.
        one = trial(cases.ChunkCase((70, 65, 3), value_size=128), seed)
        one.arguments["has_initial_state"] = torch.tensor([True, True, False])
        verdict = one.judged()
    finally:
        dispatch.unregister(chunk.OPERATOR, "cpu", "faulty")
    print(verdict)
    assert "the relative error is" in verdict.wrong
    assert verdict.share > 2


def missing(call: chunk.Call) -> None:
    reference.run(call)
    call.out[0, 0, 0] = math.nan


def beyond(call: chunk.Call) -> None:
    reference.run(call)
    call.out[-1] = 0.0


def elsewhere(call: chunk.Call) -> None:
    reference.run(call)
    spare = set(range(len(call.final))) - set(call.state_indices.tolist())
    call.final[spare.pop()] += 1.0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (missing, "1 of 33792 elements are no finite number"),
        (beyond, "tokens behind the last sequence were written"),
        (elsewhere, "a slot of no sequence was written"),
    ],
)
def test_what_must_not_be_touched(run, message, seed):
    dispatch.register(chunk.OPERATOR, "cpu", dispatch.Implementation("faulty", run, priority=99))
    try:
        verdict = trial(cases.ChunkCase((63, 3), tail=2), seed).judged()
    finally:
        dispatch.unregister(chunk.OPERATOR, "cpu", "faulty")
    assert message in verdict.wrong


def test_the_first_candidate_is_the_one_that_serves():
    names = [i.name for i in trial(cases.ChunkCase((5,)), 1).candidates()]
    assert names == ["reference"]


def test_nothing_is_offered_where_there_is_no_triton_for_ascend():
    assert SUITE.offer("cpu") == []

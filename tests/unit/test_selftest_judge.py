"""The judge of the product's own self-tests, and its oracle beside that of the tests."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.rope import angles_cases, cases, fused_cases, selftest  # noqa: E402
from ascend_patch.kernels.rope import oracle as product  # noqa: E402
from ascend_patch.kernels.selftest import Expected, Verdict, fault, judge, ulp  # noqa: E402

KERNEL_TESTS = Path(__file__).resolve().parents[1] / "kernels"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARAMETERS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(dtype, seed, size=(8, 512)):
    """(a right result, what it must be) with nothing added up."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    return value.to(dtype), Expected(value, torch.zeros_like(value))


@PARAMETERS
def test_one_rounding_is_half_an_ulp(dtype, seed):
    verdict = judge(*made(dtype, seed))
    assert 0.4 < verdict.ulps <= 0.5
    assert not verdict.wrong


@PARAMETERS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_wrong(dtype, value, seed):
    got, expected = made(dtype, seed)
    got[3, 5] = value
    assert "1 of 4096 elements are no finite number" in judge(got, expected).wrong


@PARAMETERS
def test_one_element_out_of_bounds_is_wrong_and_named(dtype, seed):
    got, expected = made(dtype, seed)
    got[3, 5] *= 1.1
    wrong = judge(got, expected, "query").wrong
    assert "query: 1 of 4096 elements are out of bounds, the worst at (3, 5)" in wrong


def test_a_share_of_elements_may_miss_the_last_place_where_much_was_added_up(seed):
    """What is within the bound by its weight, and beyond one ulp: one in a thousand, no more."""
    got, expected = made(torch.bfloat16, seed)
    weight = torch.full_like(expected.value, 1e9)
    off, value = got.flatten().clone(), expected.value.flatten().clone()
    # Three units more are three units only where no power of two is between.
    off[:5], value[:5] = 1.5, 1.5
    step = ulp(off.double(), torch.bfloat16)
    for count, fine in ((4, True), (5, False)):
        there = off.double()
        there[:count] += 3 * step[:count]
        verdict = judge(there.to(torch.bfloat16).view(8, 512), Expected(value.view(8, 512), weight))
        assert bool(verdict.wrong) != fine
        assert fine or verdict.wrong == "result: 5 of 4096 elements are not within one ulp"
        assert fine or verdict.share > 1


def test_what_is_near_zero_because_two_products_cancel_does_not_count_as_far_off(seed):
    got, expected = made(torch.bfloat16, seed)
    got[0, :4], expected.value[0, :4] = 2.0**-60, 0.0
    weight = torch.ones_like(expected.value)
    verdict = judge(got, Expected(expected.value, weight))
    assert not verdict.wrong
    # torch rounds float64 to float32 on its way to bfloat16, and so some ties the other way.
    assert verdict.ulps <= 0.5 + 2.0**-16


def test_another_shape_is_wrong_and_nothing_is_right(seed):
    got, expected = made(torch.float32, seed)
    assert "[8, 511] instead of [8, 512]" in judge(got[:, 1:], expected).wrong
    empty = torch.empty(0, 4)
    assert judge(empty, Expected(empty.double(), empty.double())) == Verdict()


@PARAMETERS
def test_an_ulp_is_the_distance_to_the_next_number(dtype, seed):
    x = made(dtype, seed)[0].abs()
    x.view(-1)[:3] = torch.tensor([0.0, torch.finfo(dtype).tiny, 1.0])
    # The next one up, bit by bit.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    above = (x.view(bits) + 1).view(dtype)
    assert torch.equal(ulp(x.double(), dtype), above.double() - x.double())


def test_both_of_two_verdicts():
    both = Verdict(1.0, 0.25).and_also(Verdict(0.5, 0.5))
    assert (both.ulps, both.share, both.wrong) == (1.0, 0.5, "")
    assert fault("a").and_also(fault("b")).wrong == "a"
    assert Verdict().and_also(fault("b")).wrong == "b"


@pytest.fixture
def oracle(monkeypatch):
    """The oracle of the kernels' tests: numpy, and written apart from this one."""
    monkeypatch.syspath_prepend(str(KERNEL_TESTS))
    import rope_oracle

    yield rope_oracle
    sys.modules.pop("rope_oracle")


SOME = [*cases.correctness_cases()[::9], *cases.mrope_cases()[::3]]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_oracles_agree(case, oracle, seed):
    positions, query, key, cache = cases.make_inputs(case, seed)
    section = case.mrope_section, case.mrope_interleaved
    ours = product.phases(positions, cache, *section)
    theirs = oracle.phases(positions, cache, *section)
    assert torch.equal(ours, torch.from_numpy(theirs))
    for x in (query, key):
        if x is None:
            continue
        found = product.rotated(x, ours, case.head_size, case.is_neox_style)
        expected = oracle.rotate(x, theirs, case.head_size, case.is_neox_style)
        torch.testing.assert_close(
            found.value, torch.from_numpy(expected.value), rtol=0, atol=1e-13
        )
        assert torch.equal(found.weight, torch.from_numpy(expected.weight))


@pytest.mark.parametrize("case", angles_cases.angles_cases()[::5], ids=str)
def test_the_oracle_of_given_angles_is_the_definition(case, seed):
    """Each pair of each head, times cos + i sin of its place."""
    x, cos, sin = (t.double() for t in angles_cases.make_angles_inputs(case, seed))
    found = product.angles_expected(x, cos, sin, case.is_neox_style).value
    half = case.rotary_dim // 2
    pairs = [(j, j + half) if case.is_neox_style else (2 * j, 2 * j + 1) for j in range(half)]
    expected = x.clone()
    for j, (a, b) in enumerate(pairs):
        c, s = cos[..., j].unsqueeze(-1), sin[..., j].unsqueeze(-1)
        expected[..., a] = x[..., a] * c - x[..., b] * s
        expected[..., b] = x[..., b] * c + x[..., a] * s
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_result_that_is_rounded_many_times_is_held_to_the_bound_alone(seed):
    got, expected = made(torch.float32, seed)
    step = ulp(got.double(), torch.float32)
    off = (got.double() + 2 * step).to(torch.float32)
    near = Expected(expected.value, 4 * step / (4 * 2.0**-23))
    # Beyond an ulp at the weight's magnitude too, so that the second rule alone decides.
    small = Expected(expected.value, near.weight / 8)
    assert not judge(off, near, share_within_an_ulp=False).wrong
    assert judge(off, small).wrong


def test_the_fused_oracle_is_the_definition(seed):
    """RMSNorm and rotation of one head, written out."""
    case = next(c for c in fused_cases.fused_cases() if c.has_bias and c.rope.tokens)
    call = selftest.FusedCall(*fused_cases.make_fused_inputs(case, seed), case.options)
    qkv, positions, cache, weight, _ = (t.double() for t in call.tensors)
    size, t = case.rope.head_size, case.rope.tokens - 1
    head = qkv[t, :size]
    x = head / (head.pow(2).mean() + case.eps).sqrt() * (weight + case.weight_offset)
    x = x + call.biases["q_bias"].double()
    axes = (positions.long(), cache, case.rope.mrope_section, case.rope.mrope_interleaved)
    phase = product.phases(*axes)[t]
    half = phase.shape[0]
    for j in range(half):
        a, b = (j, j + half) if case.rope.is_neox_style else (2 * j, 2 * j + 1)
        cos, sin = phase[j].real, phase[j].imag
        x[a], x[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    found = product.fused_expected(call.tensors, call.biases, call.options)[0].value
    torch.testing.assert_close(found[t, :size], x, rtol=0, atol=1e-12)

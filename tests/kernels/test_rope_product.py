"""The torch reference over samples of the full product that meet every pair of its factors.

test_rope_interpreter.py has the Triton kernels do the same, test_rope_cuda.py the whole product on
a GPU. Of a long prefill all elements are checked to be written and some tokens to be right: what a
token becomes does not depend on the others.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import angles_judge  # noqa: E402
import fused_judge  # noqa: E402
import product  # noqa: E402
import rope_oracle as oracle  # noqa: E402
import rope_oracle_torch as oracle_torch  # noqa: E402
import sampled_judge  # noqa: E402
from rope_judge import run_and_judge  # noqa: E402

from ascend_patch.kernels.rope import cases  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", ["ROTARY", "FUSED", "ANGLES"])
def test_the_samples_meet_every_pair(name, seed):
    factors = getattr(product, name)
    sample = product.covering(factors, seed)
    met = {pair for case in sample for pair in product.pairs_of(case)}
    assert met == product.pairs(factors)
    assert len(sample) < 400


def test_rotary_embedding(seed):
    for n, factors in enumerate(product.covering(product.ROTARY, seed)):
        case = product.rotary_case(factors)
        long = case.tokens > sampled_judge.LONG
        (sampled_judge.rotary if long else run_and_judge)(case, seed + n)


def test_split_qkv_rmsnorm_rope(seed):
    for n, factors in enumerate(product.covering(product.FUSED, seed)):
        case = product.fused_case(factors)
        long = case.rope.tokens > sampled_judge.LONG
        (sampled_judge.fused if long else fused_judge.run_and_judge)(case, seed + n)


def test_apply_rotary(seed):
    for n, factors in enumerate(product.covering(product.ANGLES, seed)):
        angles_judge.run_and_judge(product.angles_case(factors), seed + n)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("style", cases.STYLES)
@pytest.mark.parametrize("section", [None, (24, 20, 20)])
def test_the_two_oracles_agree(dtype, style, section, seed):
    """And the second one rejects what the first one would: a value that is two units off."""
    case = cases.RopeCase(
        33, 4, 2, 192, 128, style, dtype, mrope_section=section, mrope_interleaved=True
    )
    positions, query, _, cache = cases.make_inputs(case, seed)
    options = (case.mrope_section, case.mrope_interleaved)
    phase = oracle_torch.phases(positions, cache, *options)
    want = oracle.rotate(query, oracle.phases(positions, cache, *options), 192, style)
    right = torch.from_numpy(want.value).to(query.dtype)
    oracle.assert_close(right, want)
    oracle_torch.judge(right, query, phase, 192, style)
    wrong = right.clone()
    wrong[7, 3] += 8 * torch.from_numpy(oracle.ulp(want.value, query.dtype))[7, 3] + 1e-5
    with pytest.raises(AssertionError, match="out of bounds"):
        oracle.assert_close(wrong, want)
    with pytest.raises(AssertionError, match="out of bounds"):
        oracle_torch.judge(wrong, query, phase, 192, style)
    wrong[7, 3] = float("nan")
    with pytest.raises(AssertionError, match="out of bounds"):
        oracle_torch.judge(wrong, query, phase, 192, style)

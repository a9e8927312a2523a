"""rotary_embedding against the fp64 oracle, over the shapes in cases.py, on each device there is.

On CPU that judges the torch reference, on CUDA the Triton kernel. test_rope_interpreter.py runs the
same kernel on CPU, test_rope_ascend.py compiles it for Ascend.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import rope_oracle as oracle  # noqa: E402
from rope_judge import run_and_judge  # noqa: E402

from ascend_patch.kernels import rope  # noqa: E402
from ascend_patch.kernels.rope import cases  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")


def test_poison_is_visible():
    assert torch.empty(8).isnan().all()
    assert torch.empty(8, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("case", cases.correctness_cases(), ids=str)
def test_matches_oracle(case, seed, device):
    run_and_judge(case, seed, device)


@pytest.mark.parametrize("case", cases.mrope_cases(), ids=str)
def test_mrope_matches_oracle(case, seed, device):
    run_and_judge(case, seed, device)


@pytest.mark.parametrize("case", cases.upstream_cases(), ids=str)
def test_upstreams_shapes_match_oracle(case, seed, device):
    run_and_judge(case, seed, device)


@pytest.mark.parametrize("case", cases.large_cases(), ids=str)
def test_long_prefill_matches_oracle(case, seed, device):
    run_and_judge(case, seed, device)


@pytest.mark.parametrize(
    "case", [c for c in cases.serving_cases() if c.tokens <= 64 and c.name != "phi-2"], ids=str
)
def test_models_match_oracle(case, seed, device):
    run_and_judge(case, seed, device)


def test_every_axis_value_is_covered():
    """The trimmed product may lose combinations but no value, nor a pair with the head counts."""
    grid = cases.correctness_cases()
    assert {c.tokens for c in grid} == set(cases.TOKENS)
    assert {c.positions for c in grid} == set(cases.POSITIONS)
    assert {(c.head_size, c.rotary_dim) for c in grid} == set(cases.HEADS)
    assert {c.cache_dtype for c in grid} == set(cases.DTYPES)
    met = {(c.query_heads, c.key_heads, c.from_qkv) for c in grid if c.tokens > 1}
    assert met >= {(q, k, f) for q, k in cases.HEAD_COUNTS for f in (True, False)}
    mrope = cases.mrope_cases()
    assert {(c.mrope_interleaved, c.text_only, c.dtype) for c in mrope if c.tokens > 1} == {
        (i, t, d) for i in (True, False) for t in (True, False) for d in cases.DTYPES
    }


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_oracle_rejects_a_wrong_rotation(dtype, seed):
    """The negative control: a comparison that cannot fail shows nothing."""
    case = cases.RopeCase(7, 4, 2, 64, 64, dtype=dtype)
    positions, query, key, cache = cases.make_inputs(case, seed)
    negated = cache.clone()
    negated[:, 32:] *= -1
    got, _ = rope.rotary_embedding(positions, query, key, negated, **case.options)
    expected = oracle.rotate(query, oracle.phases(positions, cache), 64, True)
    with pytest.raises(AssertionError, match="out of bounds"):
        oracle.assert_close(got, expected)


def test_oracle_rejects_a_second_rounding(seed):
    """Rounding the products to bfloat16 as well is the fault that the 99.9 % are there to find."""
    case = cases.RopeCase(257, 4, 2, 64, 64)
    positions, query, _, cache = cases.make_inputs(case, seed)
    angles = cache[positions].to(torch.bfloat16)
    cos, sin = angles[:, None, :32], angles[:, None, 32:]
    a, b = query.view(257, 4, 64).chunk(2, dim=-1)
    got = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).view(257, 256)
    expected = oracle.rotate(query, oracle.phases(positions, cache.to(torch.bfloat16)), 64, True)
    with pytest.raises(AssertionError, match=r"within one ulp|out of bounds"):
        oracle.assert_close(got, expected)


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("rotary_dim", [80, 32])
@pytest.mark.parametrize("batched", [None, "shared", "per entry"])
def test_apply_rotary_matches_oracle(is_neox_style, rotary_dim, batched, seed):
    generator = torch.Generator().manual_seed(seed)
    batch, s, h, d = 3, 17, 4, 80
    x = torch.randn(batch, h, s, d, generator=generator).bfloat16().transpose(1, 2)  # strided
    angles = torch.randn(batch, s, rotary_dim // 2, generator=generator)
    if batched is None:
        x, angles = x[0], angles[0]
    elif batched == "shared":
        angles = angles[0]
    got = rope.apply_rotary(x, angles.cos(), angles.sin(), is_neox_style=is_neox_style)
    assert got.is_contiguous()
    assert got.shape == x.shape
    phase = angles.cos().double().numpy() + 1j * angles.sin().double().numpy()
    for i in range(batch if batched else 1):
        one = got[i] if batched else got
        expected = oracle.rotate(
            x[i] if batched else x,
            phase[i] if batched == "per entry" else phase,
            d,
            is_neox_style,
        )
        oracle.assert_close(one, expected)


def test_apply_rotary_empty_sequence():
    x, angle = torch.empty(0, 2, 64), torch.empty(0, 32)
    assert rope.apply_rotary(x, angle, angle, is_neox_style=True).shape == (0, 2, 64)


def test_heads_as_a_dimension_and_any_shape_of_positions(seed):
    case = cases.RopeCase(12, 4, 2, 64, 64)
    positions, query, key, cache = cases.make_inputs(case, seed)
    flat = rope.rotary_embedding(positions, query, key, cache, **case.options)
    split = rope.rotary_embedding(
        positions.view(3, 2, 2),
        query.unflatten(1, (4, 64)),
        key.unflatten(1, (2, 64)),
        cache,
        **case.options,
    )
    for a, b in zip(flat, split, strict=True):
        assert b.shape == (12, a.shape[1] // 64, 64)
        assert torch.equal(a, b.flatten(1))


def test_positions_outside_the_cache_take_its_nearest_row(seed):
    case = cases.RopeCase(4, 2, 1, 64, 64, max_position=16)
    _, query, key, cache = cases.make_inputs(case, seed)
    outside, nearest = torch.tensor([-5, 16, 3, 2**40]), torch.tensor([0, 15, 3, 15])
    got = rope.rotary_embedding(outside, query, key, cache, **case.options)
    expected = rope.rotary_embedding(nearest, query, key, cache, **case.options)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_text_positions_equal_three_equal_rows(seed):
    for interleaved in (False, True):
        case = cases.RopeCase(
            9, 2, 1, 128, 128, mrope_section=(24, 20, 20), mrope_interleaved=interleaved
        )
        positions, query, key, cache = cases.make_inputs(case, seed)
        text = positions[1]
        rows = text.expand(3, -1)
        got = rope.rotary_embedding(text, query, key, cache, **case.options)
        expected = rope.rotary_embedding(rows, query, key, cache, **case.options)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])

"""What holds for any rotary embedding, on inputs that hypothesis makes up."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from dataclasses import replace  # noqa: E402

import rope_oracle as oracle  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels import rope  # noqa: E402
from ascend_patch.kernels.rope import cases  # noqa: E402

quick = settings(max_examples=40, deadline=None, database=None, print_blob=True)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def rope_cases(draw, dtypes=cases.DTYPES):
    head_size = draw(st.integers(1, 24)) * 8
    rotary_dim = 2 * draw(st.integers(1, head_size // 2))
    half = rotary_dim // 2
    section = None
    if draw(st.booleans()):
        time = draw(st.integers(0, half))
        height = draw(st.integers(0, half - time))
        section = (time, height, half - time - height)
    return cases.RopeCase(
        tokens=draw(st.integers(0, 9)),
        query_heads=draw(st.integers(1, 5)),
        key_heads=draw(st.integers(1, 3)),
        head_size=head_size,
        rotary_dim=rotary_dim,
        is_neox_style=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        cache_dtype=draw(st.sampled_from(cases.DTYPES)),
        positions_dtype=draw(st.sampled_from(("int32", "int64"))),
        max_position=draw(st.integers(1, 64)),
        mrope_section=section,
        mrope_interleaved=draw(st.booleans()),
        text_only=draw(st.booleans()),
    )


def pairs(x, case):
    """[T, H*D] -> the two members of each rotated pair, fp64 [T, H, rotary_dim/2]."""
    heads = x.double().unflatten(-1, (x.shape[-1] // case.head_size, case.head_size))
    rotated = heads[..., : case.rotary_dim]
    if case.is_neox_style:
        return rotated.chunk(2, dim=-1)
    return rotated[..., ::2], rotated[..., 1::2]


@quick
@given(case=rope_cases(), seed=seeds)
def test_any_case_matches_the_oracle(case, seed):
    """Head sizes, sections and cache lengths that nobody listed."""
    positions, query, key, cache = cases.make_inputs(case, seed)
    got = rope.rotary_embedding(positions, query, key, cache, **case.options)
    phase = oracle.phases(positions, cache, case.mrope_section, case.mrope_interleaved)
    for x, rotated in zip((query, key), got, strict=True):
        expected = oracle.rotate(x, phase, case.head_size, case.is_neox_style)
        oracle.assert_close(rotated, expected)


@quick
@given(case=rope_cases(dtypes=("float32",)), seed=seeds)
def test_the_norm_of_each_pair_stays(case, seed):
    positions, query, key, cache = cases.make_inputs(replace(case, cache_dtype="float32"), seed)
    got, _ = rope.rotary_embedding(positions, query, key, cache, **case.options)
    before, after = (torch.hypot(*pairs(x, case)) for x in (query, got))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)


@quick
@given(case=rope_cases(dtypes=("float32",)), seed=seeds, data=st.data())
def test_rotations_compose(case, seed, data):
    """Position a, then position b, is position a + b."""
    case = replace(case, cache_dtype="float32", max_position=130, mrope_section=None)
    _, query, key, cache = cases.make_inputs(case, seed)
    draw = st.lists(st.integers(0, 64), min_size=case.tokens, max_size=case.tokens)
    a, b = (torch.tensor(data.draw(draw), dtype=torch.int64) for _ in range(2))
    once, _ = rope.rotary_embedding(a, query, key, cache, **case.options)
    twice, _ = rope.rotary_embedding(b, once, key, cache, **case.options)
    direct, _ = rope.rotary_embedding(a + b, query, key, cache, **case.options)
    torch.testing.assert_close(twice, direct, rtol=1e-5, atol=2e-6)


@quick
@given(case=rope_cases(), seed=seeds)
def test_elements_past_rotary_dim_keep_their_bits(case, seed):
    """Bits, not values: NaN payloads, infinities and negative zeros included."""
    positions, query, key, cache = cases.make_inputs(case, seed)
    integer = torch.int32 if case.dtype == "float32" else torch.int16
    bits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(bits.min, bits.max, query.shape, generator=generator, dtype=integer)
    query = noise.view(query.dtype)
    got, _ = rope.rotary_embedding(positions, query, key, cache, **case.options)
    heads = (case.tokens, case.query_heads, case.head_size)
    passed, original = (x.view(integer).view(heads)[..., case.rotary_dim :] for x in (got, query))
    assert torch.equal(passed, original)


@quick
@given(case=rope_cases(), seed=seeds)
def test_in_place_strided_and_keyless_calls_agree_bit_by_bit(case, seed):
    positions, query, key, cache = cases.make_inputs(case, seed)
    got_query, got_key = rope.rotary_embedding(positions, query, key, cache, **case.options)

    packed = rope.rotary_embedding(
        positions, query.contiguous(), key.contiguous(), cache, **case.options
    )
    assert torch.equal(got_query, packed[0])
    assert torch.equal(got_key, packed[1])

    alone, nothing = rope.rotary_embedding(positions, query, None, cache, **case.options)
    assert torch.equal(got_query, alone)
    assert nothing is None

    base = query._base
    rest = base[:, query.shape[1] + key.shape[1] :].clone()
    assert rope.rotary_embedding_(positions, query, key, cache, **case.options) is None
    assert torch.equal(got_query, query)
    assert torch.equal(got_key, key)
    assert torch.equal(base[:, query.shape[1] + key.shape[1] :], rest), "wrote past the slices"


@quick
@given(case=rope_cases(), seed=seeds)
def test_position_zero_changes_nothing(case, seed):
    positions, query, key, cache = cases.make_inputs(case, seed)
    got, _ = rope.rotary_embedding(positions * 0, query, key, cache, **case.options)
    assert torch.equal(got, query)

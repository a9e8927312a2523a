"""What kernels/rope's gate before torch_npu's operators lets through, the surface takes.

The two have their limits from the same documentation and not from each other. Without the gate the
surface refuses, so that the gate is what is looked at.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import settings as examples  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from ascend_patch.kernels.npu_ops import surface  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402
from ascend_patch.kernels.rope import npu_call, reference  # noqa: E402

RELEASES = ("2.7.1", "2.9.0", "2.10.0", "2.13.0")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
many = examples(max_examples=150, deadline=None, database=None, print_blob=True)
taken: dict[tuple[str, str], int] = {}


@pytest.fixture(params=RELEASES)
def release(request):
    if hasattr(torch.ops.npu, "npu_mrope"):
        pytest.skip("torch_npu is loaded here: its schemas are those of one release")
    installed = surface.install(request.param, strict=True)
    taken.clear()
    yield request.param
    installed.remove()


def count(operator: str, name: str) -> None:
    taken[operator, name] = taken.get((operator, name), 0) + 1


@st.composite
def calls(draw):
    """The arguments of rotary_embedding's implementations, of any shape that the API has."""
    head_size = draw(st.sampled_from((16, 32, 48, 64, 80, 96, 128, 192, 256, 512, 894, 896, 1024)))
    rotary_dim = draw(
        st.sampled_from([w for w in (2, 16, 32, 64, 80, 96, 128, head_size) if w <= head_size])
    )
    tokens, heads = draw(st.sampled_from((1, 2, 5))), draw(st.sampled_from((1, 2, 7, 999, 1000)))
    if head_size > 64 and heads > 7:
        heads = 3
    key_heads = draw(st.sampled_from((None, 1, heads)))
    half = rotary_dim // 2
    sections = [None, (half, 0, 0), (half - half // 3 * 2, half // 3, half // 3)]
    sections += [(16, 24, 24)] * 3 if half == 64 else []
    section = draw(st.sampled_from(sections))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))

    def rows(count):
        flat = torch.randn(tokens, count * head_size + 8, generator=generator).to(dtype)
        # As it comes out of a projection, or as heads.
        part = flat[:, : count * head_size]
        return part if draw(st.booleans()) else part.unflatten(1, (count, head_size))

    shape = (3, tokens) if section and draw(st.booleans()) else (tokens,)
    positions = torch.randint(-3, 20, shape, generator=generator)
    cache_dtype = dtype if draw(st.integers(0, 3)) else draw(st.sampled_from(DTYPES))
    angles = torch.rand(16, half, generator=generator) * 6
    cache = torch.cat((angles.cos(), angles.sin()), 1).to(cache_dtype)
    query = rows(heads)
    key = None if key_heads is None else rows(key_heads)
    if draw(st.booleans()):
        positions = positions.int()
    options = (head_size, draw(st.booleans()), section, draw(st.booleans()))
    return positions, query, key, cache, *options


def fresh(x):
    return None if x is None else torch.full(x.shape, torch.nan, dtype=x.dtype)


def close(found, wanted) -> None:
    """Both are float32 arithmetic, rounded once: apart by a rounding at most."""
    for a, b in zip(found, wanted, strict=True):
        if b is not None:
            room = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}[b.dtype]
            torch.testing.assert_close(a, b, rtol=room, atol=room)


@pytest.mark.parametrize("name", [npu_call.MROPE, npu_call.ROTARY_MUL])
def test_what_the_gate_lets_through_of_rotary_embedding(name, release):
    implementation = npu_call.IMPLEMENTATIONS["rotary_embedding", name]

    @many
    @given(call=calls())
    def check(call):
        query, key = call[1:3]
        outs = fresh(query), fresh(key)
        ok, reason = implementation.supports(*outs, *call)
        count("taken" if ok else reason[:40], name)
        if not ok:
            return
        wanted = fresh(query), fresh(key)
        reference.rotary_embedding_into(*wanted, *call)
        implementation.run(*outs, *call)
        close(outs, wanted)

    check()
    print(taken)
    assert taken["taken", name] > 10
    assert len(taken) > 1


@st.composite
def angle_calls(draw):
    """The arguments of apply_rotary's implementations."""
    width = draw(st.sampled_from((2, 32, 72, 80, 128, 894, 896)))
    head_size = width + draw(st.sampled_from((0, 0, 16)))
    batch, places = draw(st.sampled_from((None, 1, 3, 999, 1000))), draw(st.sampled_from((1, 5)))
    heads = draw(st.sampled_from((1, 2, 12)))
    if width > 128:
        batch = draw(st.sampled_from((None, 2)))
    if width < 80:
        heads = draw(st.sampled_from((1, 2, 12, 999, 1000))) if batch in (None, 1) else heads
    dtype = draw(st.sampled_from(DTYPES))
    lead = (places,) if batch is None else (batch, places)
    each = batch is not None and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    x = torch.randn(*lead, heads, head_size, generator=generator).to(dtype)
    angles = torch.rand(*(lead if each else (places,)), width // 2, generator=generator) * 6
    angle_dtype = dtype if draw(st.integers(0, 3)) else draw(st.sampled_from(DTYPES))
    return x, angles.cos().to(angle_dtype), angles.sin().to(angle_dtype), draw(st.booleans())


def test_what_the_gate_lets_through_of_apply_rotary(release):
    implementation = npu_call.IMPLEMENTATIONS["apply_rotary", npu_call.ROTARY_MUL]

    @many
    @given(call=angle_calls())
    def check(call):
        out = fresh(call[0])
        ok, reason = implementation.supports(out, *call)
        count("taken" if ok else reason[:40], "apply")
        if not ok:
            return
        wanted = fresh(call[0])
        reference.apply_rotary_into(wanted, *call)
        implementation.run(out, *call)
        close([out], [wanted])

    check()
    print(taken)
    assert taken["taken", "apply"] > 10
    assert len(taken) > 1


def test_without_the_gate_the_surface_refuses(release):
    """The control: calls that the gate turns down for a documented limit."""
    cache = torch.ones(4, 48, dtype=torch.bfloat16)
    query = torch.ones(2, 4 * 48, dtype=torch.bfloat16)
    call = torch.arange(2), query, query, cache, 48, True, None, False
    ok, _ = npu_call.mrope_supports(fresh(query), fresh(query), *call)
    assert not ok
    with pytest.raises(OperatorError, match="multiple of 32"):
        npu_call.mrope_into(fresh(query), fresh(query), *call)
    x, angles = torch.ones(1000, 1, 1, 32), torch.ones(1, 16)
    ok, _ = npu_call.angles_supports(fresh(x), x, angles, angles, True)
    assert not ok
    with pytest.raises(OperatorError, match="B and N below 1000"):
        npu_call.angles_into(fresh(x), x, angles, angles, True)

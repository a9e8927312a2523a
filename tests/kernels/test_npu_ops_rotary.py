"""The rotary operators against fp64, element by element, rounded once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rope_oracle import Expected, assert_close, phases, rotate  # noqa: E402

from ascend_patch.kernels.npu_ops import rotary  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fp64(x) -> np.ndarray:
    return x.double().numpy()


def turned(x, cos, sin, half: bool) -> Expected:
    """x [..., D], cos and sin of any shape that broadcasts: y_j = x_j c_j - or + x_partner s_j."""
    x, cos, sin = (fp64(a) for a in (x, cos, sin))
    width = x.shape[-1]
    value, weight = np.empty_like(x), np.empty_like(x)
    cos, sin = (np.broadcast_to(a, x.shape) for a in (cos, sin))
    for j in range(width):
        if half:
            partner, sign = (j + width // 2, -1) if j < width // 2 else (j - width // 2, 1)
        else:
            partner, sign = (j + 1, -1) if j % 2 == 0 else (j - 1, 1)
        terms = x[..., j] * cos[..., j], sign * x[..., partner] * sin[..., j]
        value[..., j] = terms[0] + terms[1]
        weight[..., j] = np.abs(x[..., j]) + np.abs(x[..., partner])
    return Expected(value, weight)


def randn(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


def angles(generator, *shape, dtype=torch.float32):
    """Documented to be from -1 to 1, and no more than that: not on a circle."""
    return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)


# The shapes of the documentation, for an input of each layout; B 3, S 5, N 4, D 16.
HALF = {
    "BNSD": ((3, 4, 5), [(1, 1, 5), (3, 1, 5), (3, 4, 5)]),
    "BSND": ((3, 5, 4), [(1, 5, 1), (3, 5, 1), (3, 5, 4)]),
    "SBND": ((5, 3, 4), [(5, 1, 1), (5, 3, 1), (5, 3, 4)]),
    "TND": ((5, 4), [(5, 1), (5, 4)]),
}
MUL = [
    (layout, x, r, mode)
    for layout, (x, shapes) in HALF.items()
    for r in shapes
    for mode in (("half", "interleave") if r == shapes[0] else ("half",))
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("layout", "x_shape", "r_shape", "mode"), MUL)
def test_rotary_mul(seed, dtype, layout, x_shape, r_shape, mode):
    generator = torch.Generator().manual_seed(seed)
    x = randn(generator, *x_shape, 32, dtype=dtype)
    r1, r2 = (angles(generator, *r_shape, 32, dtype=dtype) for _ in range(2))
    copy = x.clone()
    got = rotary.npu_rotary_mul(x, r1, r2, mode)
    assert got.dtype == dtype
    assert_close(got, turned(x, r1, r2, mode == "half"))
    assert torch.equal(x, copy)
    # By a matrix, [D, D]: what each element of x is added to, and with which sign.
    matrix = torch.zeros(32, 32, dtype=dtype)
    for j in range(32):
        if mode == "half":
            partner, sign = (j + 16, -1) if j < 16 else (j - 16, 1)
        else:
            partner, sign = (j + 1, -1) if j % 2 == 0 else (j - 1, 1)
        matrix[partner, j] = sign
    with settings(release="2.10.0"):
        assert_close(
            rotary.npu_rotary_mul(x, r1, r2, mode, matrix), turned(x, r1, r2, mode == "half")
        )


def test_rotary_mul_rounds_the_angles_to_the_inputs_dtype(seed):
    generator = torch.Generator().manual_seed(seed)
    x = randn(generator, 1, 7, 2, 64, dtype=torch.bfloat16)
    r1, r2 = (angles(generator, 1, 7, 1, 64) for _ in range(2))
    got = rotary.npu_rotary_mul(x, r1, r2)
    assert torch.equal(got, rotary.npu_rotary_mul(x, r1.bfloat16(), r2.bfloat16()))
    assert_close(got, turned(x, r1.bfloat16(), r2.bfloat16(), True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["BSND", "TND"])
@pytest.mark.parametrize("width", [64, 128])
def test_apply_rotary_pos_emb_changes_query_and_key(seed, dtype, layout, width):
    generator = torch.Generator().manual_seed(seed)
    rows = (2, 5) if layout == "BSND" else (10,)
    query, key = (randn(generator, *rows, heads, width, dtype=dtype) for heads in (6, 2))
    cos, sin = (angles(generator, *rows, 1, width, dtype=dtype) for _ in range(2))
    expected = [turned(x, cos, sin, True) for x in (query, key)]
    # A view of the model's own memory: what lies around it stays.
    around = [torch.full((*rows, x.shape[-2], width + 3), 5.0).to(dtype) for x in (query, key)]
    views = [a[..., :width] for a in around]
    for view, x in zip(views, (query, key), strict=True):
        view.copy_(x)
    out = rotary.npu_apply_rotary_pos_emb(*views, cos, sin, layout)
    for found, view, whole, wanted in zip(out, views, around, expected, strict=True):
        assert_close(view, wanted)
        assert torch.equal(found, view)
        assert (whole[..., width:] == 5).all()


SECTIONS = {None: "2.7.1", (16, 24, 24): "2.7.1", (24, 20, 20): "2.10.0"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleaved", "interleave", None])
@pytest.mark.parametrize(
    ("section", "release", "turns"),
    [(s, r, t) for s, r in SECTIONS.items() for t in (False, True) if not t or r == "2.10.0"],
)
def test_mrope(seed, dtype, mode, section, release, turns):
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = 9, 40
    for head_size, heads in ((128, (6, 2)), (192, (3, 3))):
        query, key = (randn(generator, tokens, n * head_size, dtype=dtype) for n in heads)
        cache = angles(generator, rows, 128, dtype=dtype)
        shape = (tokens,) if section is None else (3, tokens)
        positions = torch.randint(0, rows, shape, generator=generator)
        phase = phases(positions, cache, list(section) if section else None, turns)
        copies = query.clone(), key.clone()
        with settings(release=release):
            out = rotary.npu_mrope(
                positions, query, key, cache, head_size,
                mrope_section=list(section or (0, 0, 0)), rotary_mode=mode,
                cache_mode="interleave" if turns else "default",
            )  # fmt: skip
        for found, x, copy in zip(out, (query, key), copies, strict=True):
            assert found.dtype == dtype
            assert torch.equal(x, copy)
            assert_close(found, rotate(x, phase, head_size, mode in (None, "half")))


def test_mrope_of_four_sections_and_eight_wide_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    for section, width in (((16, 16, 16, 16), 128), ((8, 12, 12), 64)):
        query, key = (randn(generator, 5, 2 * 128) for _ in range(2))
        cache = angles(generator, 30, width)
        positions = torch.randint(0, 30, (len(section), 5), generator=generator, dtype=torch.int32)
        table = fp64(cache)
        axes = [axis for axis, size in enumerate(section) for _ in range(size)]
        half = width // 2
        rows = positions.numpy()
        columns = [
            table[rows[axis], j] + 1j * table[rows[axis], half + j] for j, axis in enumerate(axes)
        ]
        with settings(release="2.10.0"):
            out = rotary.npu_mrope(positions, query, key, cache, 128, mrope_section=list(section))
        for found, x in zip(out, (query, key), strict=True):
            assert_close(found, rotate(x, np.stack(columns, 1), 128, True))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_rotary_embedding_takes_a_heads_width_from_the_cache(seed, dtype, neox, width):
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = 7, (8, 2)
    query, key = (randn(generator, tokens, n * width, dtype=dtype) for n in heads)
    cache = angles(generator, 50, width, dtype=dtype)
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    phase = phases(positions, cache)
    expected = [rotate(x, phase, width, neox) for x in (query, key)]
    # In NeoX style its head_size says nothing.
    given = 2 * width if neox else width
    wide = torch.cat((query, key), 1)
    views = wide[:, : heads[0] * width], wide[:, heads[0] * width :]
    for pair in ((query, key), views):
        found = rotary._npu_rotary_embedding(positions[None], *pair, given, cache, neox)
        assert found is None
        for x, wanted in zip(pair, expected, strict=True):
            assert_close(x, wanted)


def test_rotary_embedding_has_high_precision_angles_for_float16(seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = (randn(generator, 4, 256, dtype=torch.float16) for _ in range(2))
    cache = angles(generator, 9, 128)
    expected = rotate(query, phases(torch.arange(4), cache), 128, True)
    rotary._npu_rotary_embedding(torch.arange(4), query, key, 128, cache, True)
    assert_close(query, expected)


@pytest.mark.parametrize("neox", [True, False])
def test_operators_agree_where_they_mean_the_same(seed, neox):
    """A step of a model by each of the four: equal bits."""
    generator = torch.Generator().manual_seed(seed)
    mode = "half" if neox else "interleave"
    query, key = (randn(generator, 6, n * 128, dtype=torch.bfloat16) for n in (4, 2))
    cache = angles(generator, 20, 128, dtype=torch.bfloat16)
    positions = torch.randint(0, 20, (6,), generator=generator)
    cos, sin = cache[positions].chunk(2, -1)
    cos, sin = (
        (torch.cat((a, a), -1) if neox else a.repeat_interleave(2, -1))[None, :, None]
        for a in (cos, sin)
    )
    results = [rotary.npu_mrope(positions, query, key, cache, 128, rotary_mode=mode)]
    shaped = [x.view(1, 6, -1, 128) for x in (query, key)]
    results.append([rotary.npu_rotary_mul(x, cos, sin, mode) for x in shaped])
    if neox:
        copies = [x.clone() for x in shaped]
        results.append(rotary.npu_apply_rotary_pos_emb(*copies, cos, sin))
    copies = [query.clone(), key.clone()]
    rotary._npu_rotary_embedding(positions, *copies, 128, cache, neox)
    results.append(copies)
    for one, other in itertools.combinations(results, 2):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.flatten(), b.flatten())

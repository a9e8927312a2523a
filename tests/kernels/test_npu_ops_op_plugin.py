"""The surface against what op-plugin's own operator tests expect of an NPU: caches, rotary, norms.

Each test names the one of op-plugin's `test/test_custom_ops` whose shapes, inputs and tolerances it
has (rows are fewer where they repeat); the expected results are computed here, in fp64. Left out
are those for Ascend 950, for NZ tensors (a format that a CPU tensor does not have) and gradients.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from ascend_patch.kernels.npu_ops import cache, norms, rotary  # noqa: E402
from ascend_patch.kernels.npu_ops.errors import OperatorError  # noqa: E402
from ascend_patch.kernels.npu_ops.settings import settings  # noqa: E402

HALF, SINGLE = torch.float16, torch.float32


@pytest.fixture
def generator(seed):
    return torch.Generator().manual_seed(seed)


def fp64(x) -> np.ndarray:
    return x.double().numpy()


def assert_rtol(got, wanted: np.ndarray, precision: float) -> None:
    """torch_npu's assertRtolEqual, by element: relative, or absolute below 1."""
    error = np.abs(fp64(got) - wanted)
    assert (error <= precision * np.maximum(np.abs(wanted), 1)).all(), error.max()


def uniform(generator, *shape, low=0.0, high=1.0, dtype=HALF):
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)


def test_atb_reshape_and_cache(generator):
    tokens, heads, block_size, blocks = 14, 1, 16, 535
    sizes = torch.randint(1, 256, (2,), generator=generator).tolist()
    rows = [uniform(generator, tokens, heads, size) for size in sizes]
    caches = [uniform(generator, blocks, block_size, heads, size) for size in sizes]
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].int()
    expected = [fp64(c) for c in caches]
    for wanted, values in zip(expected, rows, strict=True):
        for token, slot in enumerate(slots.tolist()):
            wanted[slot // block_size, slot % block_size] = fp64(values)[token]
    cache._npu_reshape_and_cache(*rows, *caches, slots)
    for found, wanted in zip(caches, expected, strict=True):
        np.testing.assert_array_equal(fp64(found), wanted)


def test_atb_reshape_and_cache_siso(generator):
    size = int(torch.randint(1, 256, (), generator=generator))
    key, held = uniform(generator, 16, 16, size), uniform(generator, 8, 16, 16, size)
    slots = torch.randperm(128, generator=generator)[:16].int()
    wanted = fp64(held)
    for token, slot in enumerate(slots.tolist()):
        wanted[slot // 16, slot % 16] = fp64(key)[token]
    cache._npu_reshape_and_cache_siso(key, held, slots)
    np.testing.assert_array_equal(fp64(held), wanted)


@pytest.mark.parametrize("overload", ["default", "out"])
def test_atb_paged_cache_load(generator, overload):
    batch, blocks, block_size, longest, sizes = 8, 1024, 16, 512, (512, 64)
    both = torch.randn(blocks, block_size, sum(sizes), generator=generator).half()
    caches = [part.unsqueeze(2) for part in both.split(sizes, 2)]
    lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
    starts = torch.randint(0, longest // 2 + 1, (batch,), generator=generator).int()
    table = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(batch)]).int()
    rows = []
    for request, length in enumerate(lengths.tolist()):
        first = int(starts[request]) // block_size
        for place in range(0, length, block_size):
            block = int(table[request, first + place // block_size])
            rows.append(fp64(both[block])[: length - place])
    wanted = np.concatenate(rows)
    if overload == "out":
        out = [torch.full((len(wanted), 1, size), torch.nan).half() for size in sizes]
        cache.npu_paged_cache_load_out(
            *caches, table, lengths.int(), seq_starts=starts, key=out[0], value=out[1]
        )
    else:
        out = cache.npu_paged_cache_load(*caches, table, lengths.int(), seq_starts=starts)
    np.testing.assert_array_equal(fp64(torch.cat(tuple(out), 2)).reshape(wanted.shape), wanted)


def test_npu_gather_pa_kv_cache(generator):
    """Without its cumulative lengths: the test gives plain ones, and says that they are not."""
    batch, blocks, heads, block_size, size, columns = 2, 8, 4, 64, 64, 5
    caches = [torch.randn(blocks, block_size, heads, size, generator=generator).half()] * 2
    lengths = torch.randint(1, 11, (batch,), generator=generator).int()
    table = torch.randint(0, blocks, (batch, columns), generator=generator).int()
    starts = torch.randint(0, block_size, (batch,), generator=generator).int()
    # Starts within the first block read from its beginning.
    wanted = np.concatenate(
        [fp64(caches[0][int(row[0])])[:length] for row, length in zip(table, lengths, strict=True)]
    )
    out = [torch.zeros(len(wanted), heads, size).half() for _ in range(2)]
    with settings(release="2.10.0"):
        cache.npu_gather_pa_kv_cache(*caches, table, lengths, *out, seq_offset=starts)
        with pytest.raises(OperatorError, match="must hold 3 cumulative ones"):
            cache.npu_gather_pa_kv_cache(*caches, table, lengths, *out, is_seq_lens_cumsum=True)
    for found in out:
        np.testing.assert_array_equal(fp64(found), wanted)


@pytest.mark.parametrize(("size", "block_size"), [(32, 32), (64, 32), (64, 64), (64, 128)])
def test_scatter_pa_kv_cache(generator, size, block_size):
    tokens, heads, blocks, width = 16, 4, 2, 16
    rows = [torch.randn(tokens, heads, w, generator=generator).half() for w in (32, size)]
    caches = [torch.zeros(blocks, heads * w // width, block_size, width).half() for w in (32, size)]
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].int()
    cache.npu_scatter_pa_kv_cache(*rows, *caches, slots)
    for found, values in zip(caches, rows, strict=True):
        # Back to [blocks * block_size, heads * size]: the rows that were named, and zeros.
        table = fp64(found).transpose(0, 2, 1, 3).reshape(blocks * block_size, -1)
        wanted = np.zeros_like(table)
        wanted[slots.numpy()] = fp64(values).reshape(tokens, -1)
        np.testing.assert_array_equal(table, wanted)


def pairs(x: np.ndarray, half: bool) -> np.ndarray:
    """The other element of each pair, signed: -x2, x1."""
    other = np.empty_like(x)
    if half:
        middle = x.shape[-1] // 2
        other[..., :middle], other[..., middle:] = -x[..., middle:], x[..., :middle]
    else:
        other[..., ::2], other[..., 1::2] = -x[..., 1::2], x[..., ::2]
    return other


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    ("shape", "angles", "mode"),
    [
        ((2, 1024, 5, 128), (1, 1024, 1, 128), "half"),
        ((1024, 2, 5, 128), (1024, 1, 1, 128), "half"),
        ((256, 4, 32, 64), (256, 4, 1, 64), "half"),
        ((2, 2, 5, 128), (1, 2, 1, 128), "interleave"),
        ((2, 24, 5, 128), (1, 1, 5, 128), "interleave"),
        ((128, 4, 4, 256), (1, 1, 4, 256), "interleave"),
        ((64, 8, 8, 512), (1, 1, 8, 512), "interleave"),
        ((2, 2, 4), (2, 2, 4), "half"),
        ((4, 8, 8), (4, 8, 8), "half"),
        ((1, 1, 2), (1, 1, 2), "interleave"),
        ((8, 1, 4), (8, 1, 4), "interleave"),
    ],
    ids=str,
)
def test_npu_rotary_mul(generator, dtype, shape, angles, mode):
    x = uniform(generator, *shape, dtype=dtype)
    r1, r2 = (uniform(generator, *angles, dtype=dtype) for _ in range(2))
    wanted = fp64(r1) * fp64(x) + fp64(r2) * pairs(fp64(x), mode == "half")
    assert_rtol(rotary.npu_rotary_mul(x, r1, r2, mode), wanted, 1e-3 if dtype == HALF else 1e-4)


def test_npu_rotary_mul_error_param():
    x, r = torch.rand(2, 2, 5, 128), torch.rand(1, 2, 1, 128)
    with pytest.raises(RuntimeError, match="must be half or interleave"):
        rotary.npu_rotary_mul(x, r, r, "quarter")


def test_npu_rotary_mul_by_a_matrix(generator):
    """BNSD with B * N below 8 S, as its 28800 tokens are."""
    x = uniform(generator, 2, 24, 96, 128, dtype=torch.bfloat16)
    r1, r2 = (uniform(generator, 1, 1, 96, 128, dtype=torch.bfloat16) for _ in range(2))
    matrix = torch.zeros(128, 128, dtype=torch.bfloat16)
    matrix[:64, 64:], matrix[64:, :64] = torch.eye(64), -torch.eye(64)
    with settings(release="2.10.0"):
        found = rotary.npu_rotary_mul(x, r1, r2, "half", matrix)
    assert_rtol(found, fp64(r1) * fp64(x) + fp64(r2) * pairs(fp64(x), True), 2.0**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize("cache_mode", ["default", "interleave"])
@pytest.mark.parametrize("section", [[0, 0, 0], [16, 24, 24]], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(8, 8), (16, 16), (48, 30)])
def test_npu_mrope(generator, dtype, mode, cache_mode, section, tokens, heads):
    """Also with cache_mode "interleave" for plain RoPE, which its test gives, and turns nothing."""
    size = 128
    positions = torch.arange(tokens)
    if any(section):
        # Its three rows are equal; other ones tell the sections apart.
        positions = torch.stack([positions, positions.flip(0), positions.roll(1)])
    query = torch.randn(tokens, heads * size, generator=generator).to(dtype)
    key = torch.rand(tokens, heads * size, generator=generator).to(dtype)
    table = torch.rand(tokens, size, generator=generator).to(dtype)
    if not any(section):
        rows = fp64(table)[positions.numpy()]
    else:
        chosen = fp64(table)[positions.numpy()]
        rows = chosen[0].copy()
        for column in range(size // 2):
            if cache_mode == "default":
                row = 0 if column < 16 else 1 if column < 40 else 2
            else:
                row = column % 3 if column < 3 * section[1] else 0
            for half in (0, size // 2):
                rows[:, half + column] = chosen[row][:, half + column]
    cos, sin = (np.repeat(a[:, None], heads, 1) for a in np.split(rows, 2, -1))
    neox = mode == "half"
    cos, sin = (np.concatenate((a, a), -1) if neox else a.repeat(2, -1) for a in (cos, sin))
    with settings(release="2.10.0"):
        found = rotary.npu_mrope(
            positions, query, key, table, size, mrope_section=section, rotary_mode=mode,
            cache_mode=cache_mode,
        )  # fmt: skip
    for got, x in zip(found, (query, key), strict=True):
        heads_of = fp64(x).reshape(tokens, heads, size)
        wanted = heads_of * cos + pairs(heads_of, neox) * sin
        precision = {torch.bfloat16: 2.0**-8, HALF: 1e-3, SINGLE: 1e-4}[dtype]
        assert_rtol(got, wanted.reshape(tokens, -1), precision)


@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_npu_apply_rotary_pos_emb(generator, layout):
    rows = (4, 64) if layout == "BSND" else (256,)
    query, key = (uniform(generator, *rows, 16, 128) for _ in range(2))
    cos, sin = (uniform(generator, *rows, 1, 128) for _ in range(2))
    wanted = [fp64(x) * fp64(cos) + pairs(fp64(x), True) * fp64(sin) for x in (query, key)]
    found = rotary.npu_apply_rotary_pos_emb(query, key, cos, sin, layout, "half")
    for got, changed, expected in zip(found, (query, key), wanted, strict=True):
        assert_rtol(got, expected, 1e-3)
        assert_rtol(changed, expected, 1e-3)


ROWS, WIDTH = 32, 12288


def normalised(x: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * rstd * gamma, rstd


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_npu_rms_norm(generator, dtype):
    x = uniform(generator, ROWS, WIDTH, high=100, dtype=dtype)
    gamma = uniform(generator, WIDTH, high=100, dtype=SINGLE)
    y, rstd = norms.npu_rms_norm(x, gamma)
    wanted, inverse = normalised(fp64(x), fp64(gamma))
    assert_rtol(y, wanted, 1e-3 if dtype == HALF else 1e-4)
    assert_rtol(rstd, inverse, 1e-4)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_npu_add_rms_norm(generator, dtype, in_place):
    x1, x2 = (uniform(generator, ROWS, WIDTH, high=100, dtype=dtype) for _ in range(2))
    gamma = uniform(generator, WIDTH, high=100, dtype=dtype)
    # Its reference too adds in float16 first and normalises that sum.
    total = fp64(x1 + x2)
    wanted, inverse = normalised(total, fp64(gamma))
    if in_place:
        rstd = norms.npu_add_rms_norm_v2(x1, x2, gamma, 1e-6)
        y, x = x1, x2
    else:
        y, rstd, x = norms.npu_add_rms_norm(x1, x2, gamma, 1e-6)
    for got, expected in ((y, wanted), (rstd, inverse), (x, total)):
        assert_rtol(got, expected, 1e-3 if dtype == HALF else 1e-4)

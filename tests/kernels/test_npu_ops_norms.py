"""npu_rms_norm and its kin against fp64, rounded once."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from npu_ops_limits import assert_refused  # noqa: E402
from rope_oracle import ulp  # noqa: E402

from ascend_patch.kernels.npu_ops import norms  # noqa: E402

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# A float32 result of a float32 mean: a few roundings of its own size.
FP32 = 8 * 2.0**-24


def fp64(x) -> np.ndarray:
    return x.double().numpy()


def expected(x, gamma, epsilon, dims) -> tuple[np.ndarray, np.ndarray]:
    axes = tuple(range(x.ndim - dims, x.ndim))
    size = np.sqrt((x * x).sum(axes, keepdims=True) / np.prod(x.shape[x.ndim - dims :]) + epsilon)
    return x / size * gamma, 1 / size


def assert_rounded_once(got, wanted: np.ndarray) -> None:
    found = fp64(got)
    assert found.shape == wanted.shape
    assert np.isfinite(found).all()
    largest = np.maximum(np.abs(found), np.abs(wanted))
    allowed = ulp(largest, got.dtype) * 0.501 + FP32 * largest
    assert (np.abs(found - wanted) <= allowed).all()


SHAPES = [((5, 64), 1), ((3, 4, 96), 1), ((2, 3, 4, 8), 2), ((17,), 1), ((0, 32), 1)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
def test_rms_norm_is_the_fp64_answer(seed, dtype, shape, dims):
    generator = torch.Generator().manual_seed(seed)
    for gamma_dtype in {dtype, torch.float32}:
        x = (torch.randn(shape, generator=generator) * 3).to(dtype)
        gamma = torch.randn(shape[len(shape) - dims :], generator=generator).to(gamma_dtype)
        epsilon = 10.0 ** -float(torch.randint(3, 7, (), generator=generator))
        # Memory that is not contiguous holds the same numbers.
        strided = torch.stack((x, x * 0 + 7), -1)[..., 0]
        wanted, rstd = expected(fp64(x), fp64(gamma), epsilon, dims)
        for given in (x, strided):
            y, found = norms.npu_rms_norm(given, gamma, epsilon)
            assert (y.dtype, found.dtype) == (dtype, torch.float32)
            assert_rounded_once(y, wanted)
            assert_rounded_once(found, rstd)
    gamma = gamma.to(dtype)
    y, found = norms.npu_gemma_rms_norm(x, gamma, epsilon)
    assert y.dtype == dtype
    assert_rounded_once(y, expected(fp64(x), 1 + fp64(gamma), epsilon, dims)[0])
    assert_rounded_once(found, rstd)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "dims"), SHAPES[:4], ids=str)
def test_add_rms_norm_is_the_fp64_answer_of_the_sum_that_it_returns(seed, dtype, shape, dims):
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = ((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(2))
    gamma = torch.randn(shape[len(shape) - dims :], generator=generator).to(dtype)
    copies = x1.clone(), x2.clone()
    y, rstd, x = norms.npu_add_rms_norm(x1, x2, gamma, 1e-5)
    assert torch.equal(x1, copies[0])
    assert torch.equal(x2, copies[1])
    assert_rounded_once(x, fp64(x1) + fp64(x2))
    wanted, inverse = expected(fp64(x), fp64(gamma), 1e-5, dims)
    assert_rounded_once(y, wanted)
    assert_rounded_once(rstd, inverse)
    # The same in place, as torch_npu 2.10 has it.
    found = norms.npu_add_rms_norm_v2(x1, x2, gamma, 1e-5)
    assert torch.equal(found, rstd)
    assert torch.equal(x1, y)
    assert torch.equal(x2, x)


def test_default_epsilon_is_a_millionth():
    x, gamma = torch.full((1, 4), 1e-3), torch.ones(4)
    wanted = 1e-3 / np.sqrt(1e-6 + 1e-6)
    for y in (
        norms.npu_rms_norm(x, gamma)[0],
        norms.npu_add_rms_norm(x, x * 0, gamma)[0],
        norms.npu_gemma_rms_norm(x, gamma * 0)[0],
    ):
        np.testing.assert_allclose(y.numpy(), wanted, rtol=1e-6)


def bfloat16(x):
    return x.bfloat16()


X = torch.ones(3, 4, 8, dtype=torch.float16)
ONE = {"input": X, "gamma": X[0, 0]}
RMS = {
    "integers": ({"input": X.int()}, "input is torch.int32, not one of"),
    "another dtype": ({"gamma": bfloat16}, "gamma is torch.bfloat16 for an input of torch.float16"),
    "other dimensions": ({"gamma": X[0].t()}, r"gamma \[8, 4\] must be the last dimensions"),
    "too short": ({"gamma": X[0, 0, :4]}, r"gamma \[4\] must be the last dimensions"),
    "more dimensions": ({"gamma": X[None]}, r"gamma \[1, 3, 4, 8\] must be the last"),
    "empty": ({"gamma": X[0, 0, :0], "input": X[..., :0]}, r"gamma \[0\] must not be empty"),
    "nine dimensions": ({"input": X[(None,) * 6]}, "input has 9 dimensions, not 1 to 8"),
}


@pytest.mark.parametrize("name", RMS)
def test_rms_norm_refuses(name):
    changes, sentence = RMS[name]
    assert_refused(norms.npu_rms_norm, ONE, changes, sentence)
    assert_refused(norms.npu_gemma_rms_norm, ONE, changes, sentence)


def test_gemma_has_no_mixed_dtypes():
    norms.npu_rms_norm(X, X[0, 0].float())
    assert_refused(norms.npu_gemma_rms_norm, ONE, {"gamma": X[0, 0].float()}, "must have that")


TWO = {"x1": X, "x2": X, "gamma": X[0, 0]}
ADD = {
    "integers": ({n: x.int() for n, x in TWO.items()}, "x1 is torch.int32"),
    "x2's dtype": ({"x2": bfloat16}, "x2 is torch.bfloat16 and x1 torch.float16"),
    "gamma's dtype": ({"gamma": X[0, 0].float()}, "gamma is torch.float32 and x1 torch.float16"),
    "x2's shape": ({"x2": X[:1]}, r"x2 \[1, 4, 8\] must have the same shape"),
    "gamma's shape": ({"gamma": X[0, 0, :4]}, r"gamma \[4\] must be the last dimensions of x1"),
    "empty": ({"x1": X[:0], "x2": X[:0]}, r"x1 \[0, 4, 8\] is empty"),
}


@pytest.mark.parametrize("name", ADD)
def test_add_rms_norm_refuses(name):
    changes, sentence = ADD[name]
    assert_refused(norms.npu_add_rms_norm, TWO, changes, sentence)

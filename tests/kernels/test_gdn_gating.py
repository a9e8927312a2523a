"""fused_gating: its torch reference against fp64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from gdn_decode_gates import gates_in_fp64, make_gates, worst  # noqa: E402

from ascend_patch.kernels import gdn  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 4), (0, 8), (70, 32), (33, 12)])
def test_the_reference_is_the_formula(shape, dtype: str, seed: int) -> None:
    given = make_gates(*shape, dtype, seed)
    g, beta = gdn.fused_gating(**given)
    assert g.shape == beta.shape == (1, *shape)
    assert g.dtype == beta.dtype == torch.float32
    assert worst((g, beta), gates_in_fp64(**given)) < 1e-6


def test_it_bends_as_sharply_as_asked_and_ends_in_a_line(seed: int) -> None:
    given = make_gates(9, 4, "float32", seed)
    options = {"softplus_beta": 3.0, "softplus_threshold": 1.0}
    found = gdn.fused_gating(**given, **options)
    assert worst(found, gates_in_fp64(**given, **options)) < 1e-6
    assert worst(found, gates_in_fp64(**given)) > 1e-2


def test_large_gates_stay_finite() -> None:
    """float16 ends at 65504; softplus and exp do not, in float32."""
    a = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    g, beta = gdn.fused_gating(a, a, torch.tensor([2.0, 2.0]), torch.zeros(2))
    np.testing.assert_allclose(g.numpy(), [[[-60000 * np.exp(2.0), 0.0]]], rtol=1e-3)
    assert beta.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.zeros(3, 4, 1)}, ValueError, r"a must be \[T, HV\], not \(3, 4, 1\)"),
        ({"A_log": torch.zeros(4, 1)}, ValueError, r"A_log must be \[HV\]"),
        ({"b": torch.zeros(2, 4)}, ValueError, "must have one shape"),
        ({"A_log": torch.zeros(3)}, ValueError, "A_log must have one entry for each of 4 heads"),
        ({"a": torch.zeros(3, 4).long()}, TypeError, "a must be bfloat16, float16 or float32"),
        ({"softplus_beta": 0.0}, ValueError, "softplus_beta must be above 0, not 0"),
    ],
)
def test_errors_are_sentences(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        gdn.fused_gating(**{**make_gates(3, 4, "float32", 0), **changes})

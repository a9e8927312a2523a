"""One call of a causal convolution against fp64; what else it may not touch."""

from __future__ import annotations

import numpy as np
import torch
from gdn_conv_oracle import ConvCase, make_conv

from ascend_patch.kernels import gdn

FP32 = 2.0**-23


def judge_conv(
    case: ConvCase, seed: int, device: str = "cpu", run=None, update: bool = False, cut: int = 1
) -> float:
    """The largest error as a share of what rounding once allows; asserts everything else.

    ``cut`` is 2 where results are cut off instead of rounded (Triton's interpreter, bfloat16).
    """
    inputs = make_conv(case, seed, device, update)
    given = inputs.arguments
    names = [n for n, x in given.items() if torch.is_tensor(x) and n not in ("conv_state", "out")]
    kept = {name: given[name].clone() for name in names}
    function = gdn.causal_conv1d_update if update else gdn.causal_conv1d
    out = (run or function)(**given)
    for name, before in kept.items():
        same = torch.equal(given[name].nan_to_num(7.0), before.nan_to_num(7.0))
        assert same, f"{name} was written to"
    if inputs.cache is not None:
        torch.testing.assert_close(
            given["conv_state"].cpu(), inputs.cache, rtol=0, atol=0, equal_nan=True
        )
    if case.given:
        assert out is given["out"]
    assert out.shape == given["x"].shape
    assert out.dtype == given["x"].dtype
    found = out.double().cpu().numpy()
    rest = found[~inputs.written]
    assert np.isnan(rest).all() if case.given else (rest == 0).all(), "padding was written"
    found, wanted = found[inputs.written], inputs.wanted[inputs.written]
    if not found.size:
        return 0.0
    info = torch.finfo(out.dtype)
    allowed = cut * info.eps / 2 * 1.01 * np.abs(wanted) + info.smallest_normal * info.eps
    # A sum of W terms in float32, and the exponential, whose slope times the sum is below 1.1.
    allowed += 1.1 * (case.width + 8) * FP32 * inputs.weights[inputs.written]
    share = np.abs(found - wanted) / allowed
    assert np.isfinite(share).all(), "not a number"
    return float(share.max())

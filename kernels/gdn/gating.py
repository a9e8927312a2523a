"""fused_gating: the decay and the write strength of each token, from what the model projects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.gdn import gating_reference

OPERATOR = "fused_gating"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class GatingCall:
    """A checked call: a, b, g and beta [T, HV], A_log and dt_bias [HV]."""

    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    g: Tensor
    beta: Tensor
    softplus_beta: float
    threshold: float


def fused_gating(
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """What a gated delta rule layer does with its gates' projections.

    g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), in float32 throughout; where
    softplus_beta * x is above softplus_threshold, softplus(x) is x.

    Args:
        a: [T, HV], bfloat16, float16 or float32; any stride between tokens.
        b: The same.
        A_log: [HV], any of these dtypes.
        dt_bias: The same.
        softplus_beta: How sharply softplus bends, above 0.
        softplus_threshold: Where it is taken for a line.

    Returns:
        g, the log decay, and beta, both float32 [1, T, HV], as `chunk_gated_delta_rule` takes them.

    Raises:
        TypeError: A dtype outside the above.
        ValueError: Shapes or devices that do not fit, softplus_beta is not above 0, or a tensor
            requires a gradient.
        NotImplementedError: No implementation takes this call.

    Stands for vLLM's `fused_gdn_gating`, whose arguments are in another order (A_log, a, b,
    dt_bias), and which rounds beta to b's dtype from 0.11.1 on; in 0.11.0 it has no b and the layer
    itself takes b's sigmoid, in b's dtype. Source: Gated Delta Networks, arXiv:2412.06464, and
    Mamba, arXiv:2312.00752, for A and dt.
    """
    arguments.check_tensors(OPERATOR, {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias})
    check(a, b, A_log, dt_bias)
    softplus_beta = arguments.check_number("softplus_beta", softplus_beta, above=0)
    softplus_threshold = arguments.check_number("softplus_threshold", softplus_threshold)
    g, beta = (
        torch.empty(1, *a.shape, dtype=torch.float32, device=a.device) for _ in ("g", "beta")
    )
    options = softplus_beta, softplus_threshold
    call = GatingCall(a, b, A_log, dt_bias, g[0], beta[0], *options)
    choice = dispatch.select(OPERATOR, a.device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{OPERATOR} on {a.device.type}: {choice.reason}")
    dispatch.observe(OPERATOR)
    choice.implementation.run(call)
    return g, beta


def check(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> None:
    """Raise TypeError for a wrong dtype and ValueError for a wrong shape."""
    for name, x, rank in (("a", a, 2), ("b", b, 2), ("A_log", A_log, 1), ("dt_bias", dt_bias, 1)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
        if x.dim() != rank:
            wanted = "[T, HV]" if rank == 2 else "[HV]"
            raise ValueError(f"{name} must be {wanted}, not {tuple(x.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must have one shape")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x.shape[0] != a.shape[1]:
            raise ValueError(
                f"{name} must have one entry for each of {a.shape[1]} heads, not {x.shape[0]}"
            )


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", gating_reference.run)
)

"""One token of the gated delta rule in Triton: a part of a value head's state is taken past it.

With S the state before a token, S' = exp(g) S + k c^T, where c = beta (v - exp(g) S^T k), so

    o = scale S'^T q = scale (exp(g) S^T q + (k . q) c):

both products read the old state, and the new one is only written. Importing this module imports
triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.gating_kernel import log_decay, sigmoid

# vLLM's defaults, which none of its callers changes.
_SOFTPLUS_BETA = tl.constexpr(1.0)
_THRESHOLD = tl.constexpr(20.0)


@triton.jit
def past_token(
    state,
    at,
    head,
    columns,
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    o,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    o_stride,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    VK: tl.constexpr,
    RAW: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
):
    """The state behind token ``at``, whose outputs are stored."""
    AXIS_K: tl.constexpr = 1 if VK else 0
    rows = tl.arange(0, K)
    key_head = head // (HV // H)
    row_q = tl.load(q + at * q_stride + key_head * K + rows).to(tl.float32)
    row_k = tl.load(k + at * k_stride + key_head * K + rows).to(tl.float32)
    values = tl.load(v + at * v_stride + head * V + columns).to(tl.float32)
    gate = tl.load(g + at * g_stride + head)
    weight = tl.load(beta + at * beta_stride + head)
    if RAW:
        gate = log_decay(
            gate, tl.load(A_log + head), tl.load(dt_bias + head), _SOFTPLUS_BETA, _THRESHOLD
        )
        weight = sigmoid(weight)
    decay = tl.exp(gate.to(tl.float32))
    if NORMALISE:
        row_q *= tl.rsqrt(tl.sum(row_q * row_q, 0) + EPS)
        row_k *= tl.rsqrt(tl.sum(row_k * row_k, 0) + EPS)
    wide_k = tl.expand_dims(row_k, 1 - AXIS_K)
    known = tl.sum(state * wide_k, AXIS_K)
    asked = tl.sum(state * tl.expand_dims(row_q, 1 - AXIS_K), AXIS_K)
    change = (values - decay * known) * weight.to(tl.float32)
    out = (decay * asked + tl.sum(row_k * row_q, 0) * change) * scale
    tl.store(o + at * o_stride + head * V + columns, out.to(o.dtype.element_ty))
    return decay * state + wide_k * tl.expand_dims(change, AXIS_K)

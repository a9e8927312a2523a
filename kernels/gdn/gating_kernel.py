"""The gates of a gated delta rule layer in Triton. Importing this module imports triton."""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_decay(a, A_log, dt_bias, SOFTPLUS_BETA: tl.constexpr, THRESHOLD: tl.constexpr):
    """-exp(A_log) softplus(a + dt_bias); scalars or vectors, float32."""
    x = a.to(tl.float32) + dt_bias.to(tl.float32)
    bent = SOFTPLUS_BETA * x
    # An exponent that overflows is not chosen. What 1 + raised loses is added, to first order.
    raised = tl.exp(bent)
    total = 1.0 + raised
    curve = (tl.log(total) + (raised - (total - 1.0)) / total) / SOFTPLUS_BETA
    return -tl.exp(A_log.to(tl.float32)) * tl.where(bent > THRESHOLD, x, curve)


@triton.jit
def sigmoid(b):
    """In float32."""
    return 1.0 / (1.0 + tl.exp(-b.to(tl.float32)))


@triton.jit(do_not_specialize=["tokens"])
def gating_kernel(
    a,
    b,
    A_log,
    dt_bias,
    g,
    beta,
    tokens,
    a_stride,
    b_stride,
    HV: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFTPLUS_BETA: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Programs take ROWS tokens in turn: g and beta [T, HV], float32 and contiguous.

    HEADS is HV or the next power of two.
    """
    heads = tl.arange(0, HEADS)
    there = heads < HV
    rate = tl.load(A_log + heads, mask=there, other=0.0)
    bias = tl.load(dt_bias + heads, mask=there, other=0.0)
    for first in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = (rows < tokens)[:, None] & there[None, :]
        at = rows.to(tl.int64)[:, None]
        from_a = tl.load(a + at * a_stride + heads[None, :], mask=valid, other=0.0)
        from_b = tl.load(b + at * b_stride + heads[None, :], mask=valid, other=0.0)
        decay = log_decay(from_a, rate[None, :], bias[None, :], SOFTPLUS_BETA, THRESHOLD)
        tl.store(g + at * HV + heads[None, :], decay, mask=valid)
        tl.store(beta + at * HV + heads[None, :], sigmoid(from_b), mask=valid)

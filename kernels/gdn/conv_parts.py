"""What both convolution kernels are made of: taps, and the step of one token.

Sums are a chain of fused multiply-adds from the bias over the oldest input to the token's own, in
every kernel, so that a token has the same bits from a prefill, from chunks of one, and from decode.
Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column(weight, channels, known, channel_stride, tap_stride, J: tl.constexpr):
    """Tap J of each channel, float32."""
    at = weight + channels * channel_stride + J * tap_stride
    return tl.load(at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def four_columns(weight, first, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The taps of channels whose four lie together, the oldest first; read as one run."""
    at = 4 * first + tl.arange(0, 4 * CHANNELS)
    taps = tl.load(weight + at, mask=at < 4 * C, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(taps, (2 * CHANNELS, 2)))
    oldest, third = tl.split(tl.reshape(even, (CHANNELS, 2)))
    second, own = tl.split(tl.reshape(odd, (CHANNELS, 2)))
    return oldest, second, third, own


@triton.jit
def silu(x):
    """X sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def activated(total, kept, SILU: tl.constexpr, FILL: tl.constexpr):
    """The result of a sum; zero for padding where that is written."""
    if SILU:
        total = silu(total)
    if FILL:
        total = tl.where(kept, total, 0.0)
    return total

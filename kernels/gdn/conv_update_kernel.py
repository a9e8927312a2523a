"""causal_conv1d_update in Triton: one launch, one source for CUDA and for Ascend.

A program takes some channels of every n-th sequence: nobody else reads or writes that part of its
state. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.conv_parts import activated, column, four_columns


@triton.jit
def _held(state_at, place, wanted, place_stride):
    """A place of the state, float32."""
    return tl.load(state_at + place * place_stride, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _hold(state_at, place, value, wanted, place_stride):
    tl.store(state_at + place * place_stride, value.to(state_at.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["sequences"])
def conv_update_kernel(
    x,
    conv_state,
    weight,
    bias,
    state_indices,
    num_accepted_tokens,
    starts,
    out,
    sequences,
    places,
    pad_slot_id,
    x_stride,
    out_stride,
    channel_stride,
    tap_stride,
    slot_stride,
    state_stride,
    place_stride,
    index_stride,
    accepted_stride,
    C: tl.constexpr,
    W: tl.constexpr,
    FOUR: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    ACCEPTED: tl.constexpr,
    RAGGED: tl.constexpr,
    FILL: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """CHANNELS channels of every n-th sequence.

    x, out [T, C] with the strides of a token; conv_state [slots, C, places] with three strides;
    weight [C, W]. INDEXED: state_indices says each one's slot; ACCEPTED: num_accepted_tokens where
    in its state it begins; RAGGED: starts where its tokens are, else it has one. FILL: padding's
    tokens become zero.
    """
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    channels = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    known = channels < C
    if FOUR:
        w3, w2, w1, w0 = four_columns(weight, tl.program_id(0) % BLOCKS * CHANNELS, C, CHANNELS)
    else:
        w0 = column(weight, channels, known, channel_stride, tap_stride, W - 1)
        w1 = column(weight, channels, known, channel_stride, tap_stride, W - 2)
        if W >= 3:
            w2 = column(weight, channels, known, channel_stride, tap_stride, W - 3)
        if W >= 4:
            w3 = column(weight, channels, known, channel_stride, tap_stride, W - 4)
        if W >= 5:
            w4 = column(weight, channels, known, channel_stride, tap_stride, W - 5)
    begin = tl.zeros([CHANNELS], dtype=tl.float32)
    if BIAS:
        begin += tl.load(bias + channels, mask=known, other=0.0).to(tl.float32)

    for sequence in range(tl.program_id(0) // BLOCKS, sequences, tl.num_programs(0) // BLOCKS):
        slot = tl.full((), sequence, tl.int64)
        kept = slot >= 0
        if INDEXED:
            slot = tl.load(state_indices + sequence * index_stride).to(tl.int64)
            kept = (slot >= 0) & (slot != pad_slot_id)
        start = tl.full((), sequence, tl.int64)
        count = 1
        if RAGGED:
            start = tl.load(starts + sequence).to(tl.int64)
            count = (tl.load(starts + sequence + 1).to(tl.int64) - start).to(tl.int32)
        offset = 0
        if ACCEPTED:
            offset = tl.load(num_accepted_tokens + sequence * accepted_stride).to(tl.int32) - 1
            # Whatever is said, nothing outside the state is read.
            offset = tl.minimum(tl.maximum(offset, 0), places - (W - 1))
        x_at = x + start * x_stride + channels
        out_at = out + start * out_stride + channels
        state_at = conv_state + tl.maximum(slot, 0) * slot_stride + channels * state_stride
        wanted = known & kept & (count > 0)
        h1 = _held(state_at, offset + W - 2, wanted, place_stride)
        if W >= 3:
            h2 = _held(state_at, offset + W - 3, wanted, place_stride)
        if W >= 4:
            h3 = _held(state_at, offset + W - 4, wanted, place_stride)
        if W >= 5:
            h4 = _held(state_at, offset + W - 5, wanted, place_stride)
        if BARRIER:
            # A place is read by other threads than those that write it.
            tl.debug_barrier()
        if ACCEPTED:
            # Its window moved by one; the tokens follow.
            if W >= 3:
                _hold(state_at, W - 3, h1, wanted, place_stride)
            if W >= 4:
                _hold(state_at, W - 4, h2, wanted, place_stride)
            if W >= 5:
                _hold(state_at, W - 5, h3, wanted, place_stride)
        for t in range(count):
            own = tl.load(x_at + t * x_stride, mask=known, other=0.0).to(tl.float32)
            total = begin
            if W >= 5:
                total = tl.fma(h4, w4, total)
                h4 = h3
            if W >= 4:
                total = tl.fma(h3, w3, total)
                h3 = h2
            if W >= 3:
                total = tl.fma(h2, w2, total)
                h2 = h1
            total = tl.fma(h1, w1, total)
            total = tl.fma(own, w0, total)
            h1 = own
            if ACCEPTED:
                place = W - 2 + t
                _hold(state_at, place, own, wanted & (place < places), place_stride)
            total = activated(total, kept, SILU, FILL)
            tl.store(
                out_at + t * out_stride,
                total.to(out.dtype.element_ty),
                mask=known & (kept | FILL),
            )
        if not ACCEPTED:
            _hold(state_at, W - 2, h1, wanted, place_stride)
            if W >= 3:
                _hold(state_at, W - 3, h2, wanted, place_stride)
            if W >= 4:
                _hold(state_at, W - 4, h3, wanted, place_stride)
            if W >= 5:
                _hold(state_at, W - 5, h4, wanted, place_stride)

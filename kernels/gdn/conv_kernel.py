"""causal_conv1d in Triton: one launch for all sequences, one source for CUDA and for Ascend.

A program takes some channels of chunks of CHUNK tokens. Which sequence a chunk belongs to stands in
the table that the host built; without one a program looks for it in cu_seqlens. The program of a
sequence's first chunk reads its state and writes the new one: nobody else reads it.

On CUDA a program computes tiles of tokens and loads each W times, shifted, all but once out of the
cache. An Ascend core has no such cache: there one token follows the other and the inputs before it
stay where they are (ROLLS). Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ascend_patch.kernels.gdn.conv_parts import activated, column, four_columns


@triton.jit
def _find(cu_seqlens, chunk, sequences, steps, CHUNK: tl.constexpr):
    """The sequence of a chunk where there is no table, and which of its chunks it is.

    Sequence n has numbers from cu_seqlens[n] // CHUNK + n on: enough for all of its chunks, and
    known without the sequences before it. Those that it does not need lie behind its end.
    """
    low, high = 0, sequences
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(cu_seqlens + middle).to(tl.int32) // CHUNK + middle <= chunk
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, chunk - (tl.load(cu_seqlens + low).to(tl.int32) // CHUNK + low)


@triton.jit
def _before(
    x_at, state_at, first, carried, known, x_stride, place_stride, BACK: tl.constexpr,
    W: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """What lies BACK tokens before a chunk: of its sequence, of its state, or zero; float32."""
    value = tl.load(x_at - BACK * x_stride, mask=known & (first > 0), other=0.0).to(tl.float32)
    if STATE:
        place = (W - 1 - BACK) * place_stride
        held = tl.load(state_at + place, mask=known & carried & (first == 0), other=0.0)
        value += held.to(tl.float32)
    return value


@triton.jit
def _tap(
    total, weight, x_at, state_at, row, left, first, carried, known, x_stride, place_stride,
    BACK: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Add the products of what lies BACK tokens before each of a tile's."""
    inside = (row < left) & (first + row >= BACK)
    here = x_at[None, :] + (row - BACK)[:, None] * x_stride
    value = tl.load(here, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
    if STATE and BACK > 0:  # noqa: SIM102 - known when compiled, and when run
        if first == 0:
            place = state_at[None, :] + (W - 1 - BACK + row)[:, None] * place_stride
            outside = (row < BACK) & carried
            held = tl.load(place, mask=outside[:, None] & known[None, :], other=0.0)
            value += held.to(tl.float32)
    return tl.fma(value, weight[None, :], total)


@triton.jit
def _keep(
    x_at, state_at, length, kept, carried, known, x_stride, place_stride, W: tl.constexpr,
    BARRIER: tl.constexpr,
):  # fmt: skip
    """Write a sequence's last W - 1 inputs to its state; a short one keeps some of what it had."""
    for place in tl.static_range(W - 1):
        at = length - (W - 1) + place
        own = tl.load(x_at + at.to(tl.int64) * x_stride, mask=known & (at >= 0), other=0.0)
        held = tl.load(
            state_at + (W - 1 + at) * place_stride, mask=known & carried & (at < 0), other=0.0
        )
        # Each is zero where the other is not.
        value = own.to(tl.float32) + held.to(tl.float32)
        if BARRIER:
            # A place is read by other threads than those that write it.
            tl.debug_barrier()
        to = state_at + place * place_stride
        tl.store(to, value.to(state_at.dtype.element_ty), mask=known & kept)


@triton.jit(do_not_specialize=["chunks", "sequences", "steps"])
def conv_kernel(
    x,
    weight,
    bias,
    conv_state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    chunk_indices,
    out,
    chunks,
    sequences,
    steps,
    x_stride,
    out_stride,
    channel_stride,
    tap_stride,
    slot_stride,
    state_stride,
    place_stride,
    index_stride,
    C: tl.constexpr,
    W: tl.constexpr,
    FOUR: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    STATE: tl.constexpr,
    INDEXED: tl.constexpr,
    CARRIED: tl.constexpr,
    TABLE: tl.constexpr,
    FILL: tl.constexpr,
    ROLLS: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """CHANNELS channels of every n-th chunk.

    x, out [T, C] with the strides of a token; weight [C, W]; conv_state [slots, C, L] with three
    strides. STATE: there is one; INDEXED: state_indices says each sequence's slot, negative for
    padding; CARRIED: has_initial_state says who begins with it. FILL: padding's tokens become zero.
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

    for chunk in range(tl.program_id(0) // BLOCKS, chunks, tl.num_programs(0) // BLOCKS):
        if TABLE:
            sequence = tl.load(chunk_indices + 2 * chunk)
            number = tl.load(chunk_indices + 2 * chunk + 1)
        else:
            sequence, number = _find(cu_seqlens, chunk, sequences, steps, CHUNK)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start).to(tl.int32)
        first = number * CHUNK
        left = tl.minimum(length - first, CHUNK)
        slot = sequence.to(tl.int64)
        if INDEXED:
            slot = tl.load(state_indices + sequence * index_stride).to(tl.int64)
        kept = slot >= 0
        carried = kept
        if CARRIED:
            carried = kept & (tl.load(has_initial_state + sequence) != 0)
        # In int64: tokens times channels outgrow int32; within a chunk they do not.
        x_at = x + (start + first) * x_stride + channels
        out_at = out + (start + first) * out_stride + channels
        state_at = conv_state + tl.maximum(slot, 0) * slot_stride + channels * state_stride
        if ROLLS:
            h1 = _before(x_at, state_at, first, carried, known, x_stride, place_stride, 1, W, STATE)
            if W >= 3:
                h2 = _before(
                    x_at, state_at, first, carried, known, x_stride, place_stride, 2, W, STATE
                )
            if W >= 4:
                h3 = _before(
                    x_at, state_at, first, carried, known, x_stride, place_stride, 3, W, STATE
                )
            if W >= 5:
                h4 = _before(
                    x_at, state_at, first, carried, known, x_stride, place_stride, 4, W, STATE
                )
            for t in range(left):
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
                total = activated(total, kept, SILU, FILL)
                tl.store(
                    out_at + t * out_stride,
                    total.to(out.dtype.element_ty),
                    mask=known & (kept | FILL),
                )
        else:
            for done in range(0, left, TILE):
                row = done + tl.arange(0, TILE)
                total = tl.zeros([TILE, CHANNELS], dtype=tl.float32) + begin[None, :]
                if W >= 5:
                    total = _tap(
                        total, w4, x_at, state_at, row, left, first, carried, known, x_stride,
                        place_stride, 4, W, STATE,
                    )  # fmt: skip
                if W >= 4:
                    total = _tap(
                        total, w3, x_at, state_at, row, left, first, carried, known, x_stride,
                        place_stride, 3, W, STATE,
                    )  # fmt: skip
                if W >= 3:
                    total = _tap(
                        total, w2, x_at, state_at, row, left, first, carried, known, x_stride,
                        place_stride, 2, W, STATE,
                    )  # fmt: skip
                total = _tap(
                    total, w1, x_at, state_at, row, left, first, carried, known, x_stride,
                    place_stride, 1, W, STATE,
                )  # fmt: skip
                total = _tap(
                    total, w0, x_at, state_at, row, left, first, carried, known, x_stride,
                    place_stride, 0, W, STATE,
                )  # fmt: skip
                total = activated(total, kept, SILU, FILL)
                tl.store(
                    out_at[None, :] + row[:, None] * out_stride,
                    total.to(out.dtype.element_ty),
                    mask=(row < left)[:, None] & (known & (kept | FILL))[None, :],
                )
        if STATE:  # noqa: SIM102 - the same
            if (first == 0) & (length > 0):
                _keep(
                    x_at, state_at, length, kept, carried, known, x_stride, place_stride, W, BARRIER
                )

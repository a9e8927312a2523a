"""Where a sequence's state is and what it begins with, for the kernels that carry it on CUDA.

Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of(state_indices, sequence, indices_stride, INDEXED: tl.constexpr):
    """The slot of a sequence, int64: its own number, or with INDEXED what state_indices says."""
    slot = sequence.to(tl.int64)
    if INDEXED:
        slot = tl.load(state_indices + sequence * indices_stride).to(tl.int64)
    return slot


@triton.jit
def first_state(
    initial, has_initial_state, sequence, slot, place, initial_stride, K: tl.constexpr,
    COLUMNS: tl.constexpr, INDEXED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The state [K, COLUMNS] that a sequence begins with, float32.

    initial: states, a sequence's at its slot times the stride and ``place`` [K, COLUMNS] in it. It
    is not read for a slot below 0, nor with INDEXED where has_initial_state says no.
    """
    state = tl.zeros([K, COLUMNS], dtype=tl.float32)
    if INITIAL:
        wanted = slot >= 0
        if INDEXED:
            wanted = wanted & (tl.load(has_initial_state + sequence) != 0)
        state += tl.load(initial + slot * initial_stride + place, mask=wanted, other=0.0).to(
            tl.float32
        )
    return state

"""What the convolutions accept. Sentences for what they do not; no device memory is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ascend_patch.kernels import arguments

WIDTHS = (2, 3, 4, 5)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)
_SILU = ("silu", "swish", True)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | bool | None,
    conv_state: Tensor | None,
    out: Tensor | None,
) -> bool:
    """Whether the activation is silu.

    Raises:
        TypeError: A dtype.
        ValueError: A shape, a width or an activation.
    """
    if activation not in (None, False, *_SILU):
        raise ValueError(f"activation must be 'silu', 'swish' or None, not {activation!r}")
    given = {"x": x, "weight": weight, "bias": bias, "conv_state": conv_state, "out": out}
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, not {tensor.dtype}")
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"x must be [T, C], tokens first, not {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight must be [{channels}, W] with W from {WIDTHS[0]} to {WIDTHS[-1]}, "
            f"not {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], not {tuple(bias.shape)}")
    if conv_state is not None:
        shape, places = tuple(conv_state.shape), weight.shape[1] - 1
        if len(shape) != 3 or shape[1] != channels or shape[2] < places:
            raise ValueError(
                f"conv_state must be [slots, {channels}, L] with L at least {places}, not {shape}; "
                "a cache of [slots, L, C] goes in transposed"
            )
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(
            f"out must be {tuple(x.shape)} in {x.dtype}, not {tuple(out.shape)} in {out.dtype}"
        )
    if conv_state is not None:
        arguments.check_written("conv_state", conv_state)
    if out is not None:
        arguments.check_written("out", out)
        arguments.check_apart(
            "out", out, {"weight": weight, "bias": bias, "conv_state": conv_state}
        )
    return activation in _SILU


def check_states(
    conv_state: Tensor | None, state_indices: Tensor | None, has_initial_state: Tensor | None
) -> None:
    """Raise TypeError or ValueError where slots are named that there is no cache for."""
    for name, x in (("state_indices", state_indices), ("has_initial_state", has_initial_state)):
        if x is not None and conv_state is None:
            raise ValueError(f"{name} is about slots of a cache: give conv_state too")
        if x is not None and x.dim() != 1:
            raise ValueError(f"{name} must be [N], one of each sequence, not {tuple(x.shape)}")
    if state_indices is not None and state_indices.dtype not in _INDICES:
        raise TypeError(f"state_indices must be int32 or int64, not {state_indices.dtype}")
    if has_initial_state is not None and has_initial_state.dtype != torch.bool:
        raise TypeError(f"has_initial_state must be bool, not {has_initial_state.dtype}")


def check_batch(
    tokens: int,
    starts: Tensor,
    known: tuple[int, ...] | None,
    given: Mapping[str, Tensor | None],
    conv_state: Tensor | None,
) -> None:
    """Raise TypeError or ValueError where sequences and tokens, or their states, do not fit."""
    _check_starts(starts)
    if known is not None and known[-1] > tokens:
        raise ValueError(f"the sequences end at token {known[-1]}, but x has {tokens} tokens")
    if known is None:
        arguments.check_starts("query_start_loc", starts, tokens, from_zero=True)
    sequences = starts.shape[0] - 1
    _check_counts(sequences, given)
    if conv_state is not None:
        _check_slots(sequences, conv_state, given["state_indices"])


def check_update(
    sequences: int,
    conv_state: Tensor,
    starts: Tensor | None,
    given: Mapping[str, Tensor | None],
    tokens: int,
    pad_slot_id: int,
) -> None:
    """Raise TypeError or ValueError where sequences, their starts and their states do not fit."""
    if starts is not None:
        _check_starts(starts)
        if starts.shape[0] < sequences + 1:
            raise ValueError(
                f"query_start_loc has {starts.shape[0]} entries for {sequences} sequences; "
                f"there must be {sequences + 1}"
            )
        arguments.check_starts("query_start_loc", starts, tokens, sequences)
    _check_counts(sequences, given)
    accepted = given["num_accepted_tokens"]
    if accepted is not None and accepted.dtype not in _INDICES:
        raise TypeError(f"num_accepted_tokens must be int32 or int64, not {accepted.dtype}")
    _check_slots(sequences, conv_state, given["state_indices"], pad_slot_id)


def _check_slots(
    sequences: int, conv_state: Tensor, state_indices: Tensor | None, pad_slot_id: int = -1
) -> None:
    if sequences and not conv_state.shape[0]:
        raise ValueError(f"conv_state has no slots, and there are {sequences} sequences")
    if state_indices is None:
        if conv_state.shape[0] < sequences:
            raise ValueError(
                f"conv_state has {conv_state.shape[0]} slots for {sequences} sequences: name each "
                "one's slot in state_indices"
            )
        return
    named = state_indices[:sequences]
    if pad_slot_id >= 0 and arguments.on_host(named):
        named = named[named != pad_slot_id]
    arguments.check_slots("state_indices", named, conv_state.shape[0])


def _check_starts(starts: Tensor) -> None:
    if starts.dtype not in _INDICES:
        raise TypeError(f"query_start_loc must be int32 or int64, not {starts.dtype}")
    if starts.dim() != 1 or not starts.shape[0]:
        raise ValueError(f"query_start_loc must be [N + 1], not {tuple(starts.shape)}")


def _check_counts(sequences: int, given: Mapping[str, Tensor | None]) -> None:
    for name, x in given.items():
        if x is not None and (x.dim() != 1 or x.shape[0] < sequences):
            raise ValueError(
                f"{name} must have an entry for each of {sequences} sequences, not {tuple(x.shape)}"
            )

"""The convolutions through their Triton kernels: what they take, how they are launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import conv_tiles
from ascend_patch.kernels.gdn.conv import OPERATOR, UPDATE, Call, UpdateCall
from ascend_patch.kernels.triton_device import on_device, vector_cores

NAME = "triton"
_PRIORITY = 10
CHUNK = conv_tiles.CHUNK
# Where among the values of ``arguments`` the number of chunks is.
CHUNKS = 9


def supports(call: Call | UpdateCall) -> tuple[bool, str]:
    """Can the kernels take this call? (ok, reason); see ``dispatch.Implementation``."""
    for name, x in (("x", call.x), ("out", call.out)):
        if x.numel() and x.shape[1] > 1 and x.stride(1) != 1:
            return False, f"channels of a token of {name} must be adjacent in memory"
    if call.bias is not None and call.bias.numel() > 1 and call.bias.stride(0) != 1:
        return False, "bias must be contiguous"
    state = call.conv_state
    if state is not None and call.x.device.type == "npu" and state.stride(1) != 1:
        return False, "channels of a place of conv_state must be adjacent in memory"
    if isinstance(call, Call) and call.metadata is not None and CHUNK not in call.metadata.tables:
        return False, f"chunk_metadata must have the table of size {CHUNK}"
    return True, ""


def run(call: Call) -> None:
    """``conv_reference.run`` in one launch; none where no sequence has tokens."""
    from ascend_patch.kernels.gdn.conv_kernel import conv_kernel

    tiles = _tiles(conv_tiles.prefill_tiles, call)
    values, constants = arguments(call, tiles, call.x.device.type)
    if values[CHUNKS]:
        _launch(conv_kernel, values[CHUNKS], call, tiles, values, constants)


def run_update(call: UpdateCall) -> None:
    """``conv_reference.run_update`` in one launch; none without sequences."""
    from ascend_patch.kernels.gdn.conv_update_kernel import conv_update_kernel

    tiles = _tiles(conv_tiles.update_tiles, call)
    values, constants = update_arguments(call, tiles, call.x.device.type)
    if call.sequences and call.x.shape[0]:
        _launch(conv_update_kernel, call.sequences, call, tiles, values, constants)


def arguments(
    call: Call, tiles: conv_tiles.Tiles, kind: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``conv_kernel`` is launched or compiled with, by device type: (values, constants)."""
    sequences = call.starts.shape[0] - 1
    table = None if call.metadata is None else call.metadata.table(CHUNK).indices
    # Without a table, numbers are given out by the whole chunks before a sequence and one for each.
    chunks = call.x.shape[0] // CHUNK + sequences if table is None else table.shape[0]
    chunks = chunks if sequences else 0
    state = call.conv_state
    weight, four = _weight(call, kind)
    values = (
        call.x,
        weight,
        _or(call.bias, call.weight),
        _or(state, call.x),
        _or(call.state_indices, call.starts),
        _or(call.has_initial_state, call.starts),
        call.starts,
        _or(table, call.starts),
        call.out,
        chunks,
        sequences,
        sequences.bit_length(),
        call.x.stride(0),
        call.out.stride(0),
        *weight.stride(),
        *((0, 0, 0) if state is None else state.stride()),
        0 if call.state_indices is None else call.state_indices.stride(0),
    )
    constants = {
        "C": call.x.shape[1],
        "W": call.weight.shape[1],
        "FOUR": four,
        "CHUNK": CHUNK,
        "TILE": tiles.tile,
        "CHANNELS": tiles.channels,
        "SILU": call.silu,
        "BIAS": call.bias is not None,
        "STATE": state is not None,
        "INDEXED": call.state_indices is not None,
        "CARRIED": call.has_initial_state is not None,
        "TABLE": table is not None,
        "FILL": call.fill,
        "ROLLS": tiles.rolls,
        "BARRIER": kind == "cuda",
    }
    return values, constants


def update_arguments(
    call: UpdateCall, tiles: conv_tiles.Tiles, kind: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``conv_update_kernel`` is launched or compiled with: (values, constants)."""
    some = _or(call.state_indices, call.conv_state)
    accepted = call.num_accepted_tokens
    weight, four = _weight(call, kind)
    values = (
        call.x,
        call.conv_state,
        weight,
        _or(call.bias, call.weight),
        some,
        _or(accepted, some),
        _or(call.starts, some),
        call.out,
        call.sequences,
        call.conv_state.shape[2],
        call.pad_slot_id,
        call.x.stride(0),
        call.out.stride(0),
        *weight.stride(),
        *call.conv_state.stride(),
        0 if call.state_indices is None else call.state_indices.stride(0),
        0 if accepted is None else accepted.stride(0),
    )
    constants = {
        "C": call.x.shape[1],
        "W": call.weight.shape[1],
        "FOUR": four,
        "CHANNELS": tiles.channels,
        "SILU": call.silu,
        "BIAS": call.bias is not None,
        "INDEXED": call.state_indices is not None,
        "ACCEPTED": accepted is not None,
        "RAGGED": call.starts is not None,
        "FILL": call.fill,
        "BARRIER": kind == "cuda",
    }
    return values, constants


def register(device: str = "cuda") -> None:
    """Offer the kernels on a type of device."""
    offers = ((OPERATOR, run), (UPDATE, run_update))
    for operator, runs in offers:
        implementation = dispatch.Implementation(NAME, runs, supports, _PRIORITY)
        dispatch.register(operator, device, implementation)


def _tiles(choose: Any, call: Call | UpdateCall) -> conv_tiles.Tiles:
    tiles: conv_tiles.Tiles = choose(call.x.shape[1], call.x.element_size(), call.x.device.type)
    return tiles


def _weight(call: Call | UpdateCall, kind: str) -> tuple[Tensor, bool]:
    """The weight as a kernel reads it, and whether four taps of a channel lie together.

    A run of memory is read in one piece and taken apart. Other taps that lie together are turned
    first on an NPU: there a read with a stride costs 32 bytes of unified buffer an element.
    """
    weight = call.weight
    if tuple(weight.stride()) == (4, 1) and weight.shape[1] == 4:
        return weight, True
    if kind == "npu" and weight.stride(0) != 1:
        weight = weight.t().contiguous().t()
    return weight, False


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes no None for a pointer; one that stands in is never touched."""
    return other if x is None else x


def _launch(
    kernel: Any,
    items: int,
    call: Call | UpdateCall,
    tiles: conv_tiles.Tiles,
    values: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    device = call.x.device
    npu = device.type == "npu"
    cores = vector_cores(device.index or 0) if npu else 0
    options = {} if npu else {"num_warps": tiles.warps, "num_stages": 1}
    grid = (conv_tiles.programs(items, call.x.shape[1], tiles, cores),)
    with on_device(device):
        kernel[grid](*values, **constants, **options)

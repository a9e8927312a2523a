"""recurrent_gated_delta_rule through its Triton kernel: what it takes, how it is launched.

Triton is imported when the kernel first runs, never by importing this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn.recurrent import OPERATOR, RecurrentCall
from ascend_patch.kernels.gdn.reference import NORM_EPS
from ascend_patch.kernels.triton_device import on_device, vector_cores

NAME = "triton"
_SIZES = (64, 128, 256)
_PRIORITY = 10
# Elements of a state that a program holds in float32: on an NPU 32 KiB of the 192 of unified
# buffer, for the products need as much again.
_NPU_ELEMENTS = 1 << 13
# CUDA: elements of a program's part of a state, by layout and by whether there are few states. One
# warp each, so that products are summed without a barrier. Small parts keep the device busy where
# there are few; in KV the rows of a part are short runs of memory, and longer with more elements.
_ELEMENTS = {("VK", True): 1024, ("VK", False): 2048, ("KV", True): 1024, ("KV", False): 4096}
_FEW_STATES = 512
# Bytes that memory is read in: no row of a part is shorter.
_SECTOR = 32


@dataclass(frozen=True)
class Tiles:
    """Columns of V that a program takes, and on CUDA its warps."""

    columns: int
    warps: int = 1


def tiles(call: RecurrentCall, kind: str) -> Tiles:
    """The table: by layout, sizes and how many states there are, on a `cuda` or `npu`."""
    size, width = int(call.k.shape[2]), int(call.v.shape[2])
    if kind == "npu":
        return Tiles(min(width, _NPU_ELEMENTS // size))
    few = call.requests * call.v.shape[1] <= _FEW_STATES
    columns = _ELEMENTS[call.state_layout, few] // size
    if call.state_layout == "KV":
        columns = max(columns, _SECTOR // call.state.element_size())
    return Tiles(min(width, columns))


def supports(call: RecurrentCall) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    if call.k.shape[2] not in _SIZES or call.v.shape[2] not in _SIZES:
        return False, "K and V must each be 64, 128 or 256"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("out", call.out)):
        if x.numel() and (x.stride(-1) != 1 or x.stride(-2) != x.shape[-1]):
            return False, f"heads of a token of {name} must be adjacent in memory"
    gates = (("a", call.g), ("b", call.beta)) if call.raw else (("g", call.g), ("beta", call.beta))
    for name, x in (*gates, ("A_log", call.A_log), ("dt_bias", call.dt_bias)):
        if x is not None and x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            return False, f"heads of {name} must be adjacent in memory"
    if call.state.numel() and not call.state[0].is_contiguous():
        return False, "a slot of the state must be contiguous"
    for name, x in (("cu_seqlens", call.cu_seqlens), ("accepted", call.num_accepted_tokens)):
        if x is not None and x.numel() > 1 and x.stride(0) != 1:
            return False, f"{name} must be contiguous"
    return True, ""


def run(call: RecurrentCall, chosen: Tiles | None = None) -> None:
    """``recurrent_reference.run`` in one launch, or none where there are no requests."""
    from ascend_patch.kernels.gdn.recurrent_kernel import recurrent_kernel

    if not call.requests:
        return
    device = call.q.device
    kind = "npu" if device.type == "npu" else "cuda"
    chosen = chosen if chosen is not None else tiles(call, kind)
    values, constants = arguments(call, chosen, kind)
    items = item_count(call, chosen)
    options = {} if kind == "npu" else {"num_warps": chosen.warps, "num_stages": 1}
    with on_device(device):
        grid = min(items, vector_cores(device.index or 0)) if kind == "npu" else items
        recurrent_kernel[grid,](*values, **constants, **options)


def item_count(call: RecurrentCall, chosen: Tiles) -> int:
    """Parts of states, over all requests."""
    return call.requests * int(call.v.shape[1]) * (int(call.v.shape[2]) // chosen.columns)


def arguments(
    call: RecurrentCall, chosen: Tiles, kind: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is launched or compiled with: (values, constants by name)."""
    indices = call.state_indices

    def pointer(x: Tensor | None) -> Tensor:
        # Never touched; not every Triton takes None for a pointer.
        return indices if x is None else x

    values = (
        *(call.q, call.k, call.v, call.g, call.beta, pointer(call.A_log), pointer(call.dt_bias)),
        *(call.out, call.state, indices, pointer(call.cu_seqlens)),
        *(pointer(call.num_accepted_tokens), item_count(call, chosen)),
        *(x.stride(0) for x in (call.q, call.k, call.v, call.g, call.beta, call.out, call.state)),
        indices.stride(0),
        indices.stride(1) if indices.dim() == 2 else 0,
        indices.shape[1] if indices.dim() == 2 else 1,
        call.scale,
    )
    constants = {
        "H": call.k.shape[1],
        "HV": call.v.shape[1],
        "K": call.k.shape[2],
        "V": call.v.shape[2],
        "COLUMNS": chosen.columns,
        "VK": call.state_layout == "VK",
        "RAW": call.raw,
        "NORMALISE": call.normalise,
        "EPS": NORM_EPS,
        "SEQUENCES": call.cu_seqlens is not None,
        "SPECULATIVE": indices.dim() == 2,
        "ACCEPTED": call.num_accepted_tokens is not None,
        "LOOPS": kind == "npu",
    }
    return values, constants


def register(device: str = "cuda") -> None:
    """Offer the kernel on CUDA devices, or on NPUs."""
    dispatch.register(OPERATOR, device, dispatch.Implementation(NAME, run, supports, _PRIORITY))

"""gated_rms_norm through its Triton kernel: what it takes, how it is launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn.conv_tiles import next_power_of_two
from ascend_patch.kernels.gdn.gated_norm import OPERATOR, Call
from ascend_patch.kernels.triton_device import on_device, vector_cores

NAME = "triton"
_PRIORITY = 10
# Where among the values of ``arguments`` the number of items is.
ITEMS = 4
# A longer group would not stay in a program's registers, or in a core's unified buffer.
LONGEST = {"cuda": 8192, "npu": 4096}
# CUDA, not measured yet: elements of a tile for a warp, its warps, and how many rows are few.
_WARP_ELEMENTS = 1024
_WARPS = 4
_FEW_ROWS = 2048
# Elements for which what AscendNPU IR 1.2.0 plans fits the 192 KiB of a vector core's unified
# buffer with both buffers of its double buffering.
_NPU_ELEMENTS = 4096


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile, and on CUDA warps."""

    rows: int
    warps: int = 4


def tiles_of(outer: int, rows: int, group: int, kind: str) -> Tiles:
    """The tiles of ``outer`` times ``rows`` rows of groups of so many elements, by device type."""
    pad, most = next_power_of_two(group), next_power_of_two(rows)
    if kind == "npu":
        return Tiles(min(most, max(1, _NPU_ELEMENTS // pad)))
    warps = 1 if outer * rows <= _FEW_ROWS and pad <= _WARP_ELEMENTS else _WARPS
    return Tiles(min(most, max(1, warps * _WARP_ELEMENTS // pad)), warps)


def supports(call: Call) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    longest = LONGEST["npu" if call.x.device.type == "npu" else "cuda"]
    if call.group > longest:
        return False, f"a group must have at most {longest} elements"
    for name, x in (("x", call.x), ("gate", call.gate), ("out", call.out)):
        if x is not None and x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            return False, f"elements of a row of {name} must be adjacent in memory"
    if call.weight.numel() > 1 and call.weight.stride(0) != 1:
        return False, "weight must be contiguous"
    if _layout(call) is None:
        return False, "rows must lie at one stride from each other, or at two"
    return True, ""


def run(call: Call) -> None:
    """``gated_norm_reference.run`` in one launch; none without rows."""
    from ascend_patch.kernels.gdn.gated_norm_kernel import gated_norm_kernel

    layout = _layout(call)
    if layout is None or not call.x.numel():
        return
    device = call.x.device
    npu = device.type == "npu"
    tiles = tiles_of(*layout[:2], call.group, device.type)
    values, constants = arguments(call, tiles)
    programs = min(values[ITEMS], vector_cores(device.index or 0)) if npu else values[ITEMS]
    options = {} if npu else {"num_warps": tiles.warps, "num_stages": 1}
    with on_device(device):
        gated_norm_kernel[(programs,)](*values, **constants, **options)


def arguments(call: Call, tiles: Tiles) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``gated_norm_kernel`` is launched or compiled with: (values, constants by name)."""
    layout = _layout(call)
    assert layout is not None
    outer, rows, strides = layout
    groups = call.x.shape[-1] // call.group
    parts = -(-rows // tiles.rows)
    values = (
        call.x,
        call.x if call.gate is None else call.gate,
        call.weight,
        call.out,
        outer * parts * groups,
        parts,
        rows,
        *strides[0],
        *strides[1],
        *strides[2],
        call.eps,
    )
    constants = {
        "GROUP": call.group,
        "GROUPS": groups,
        "PAD": next_power_of_two(call.group),
        "TILE": tiles.rows,
        "GATE": call.gate is not None,
        "BEFORE": call.norm_before_gate,
    }
    return values, constants


def register(device: str = "cuda") -> None:
    """Offer the kernel on a type of device."""
    dispatch.register(OPERATOR, device, dispatch.Implementation(NAME, run, supports, _PRIORITY))


def _layout(call: Call) -> tuple[int, int, list[tuple[int, int]]] | None:
    """(outer, rows, strides of both for x, gate and out): rows as one axis, or as the last of two.

    None where the axes before the last do not lie so in all three.
    """
    given = (call.x, call.x if call.gate is None else call.gate, call.out)
    shape = call.x.shape[:-1]
    if not call.x.numel():
        return 0, 0, [(0, 0)] * 3
    for split in (0, len(shape) - 1):
        ends = [(_stride(x, 0, split), _stride(x, split, len(shape))) for x in given]
        found = [(a, b) for a, b in ends if a is not None and b is not None]
        if len(found) == len(given):
            return shape[:split].numel(), shape[split:].numel(), found
    return None


def _stride(x: Tensor, first: int, last: int) -> int | None:
    """The stride of axes ``first`` to ``last`` as one axis; None if they are not one."""
    stride, expected = 0, 0
    for size, step in zip(x.shape[first:last][::-1], x.stride()[first:last][::-1], strict=True):
        if size == 1:
            continue
        if expected and step != expected:
            return None
        stride = stride or step
        expected = step * size
    return stride

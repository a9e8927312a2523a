"""fused_gating through its Triton kernel: what it takes, how it is launched.

Triton is imported when the kernel first runs, never by importing this module.
"""

from __future__ import annotations

from typing import Any

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn.gating import OPERATOR, GatingCall
from ascend_patch.kernels.triton_device import on_device, vector_cores

NAME = "triton"
# Elements of a program's tile: on CUDA few, for many programs; on Ascend, as the offline compiler
# plans them, they take up to 53 bytes each of the 192 KiB of unified buffer.
_ELEMENTS = {"cuda": 512, "npu": 2048}
# Rows of a tile are padded to 32 bytes there.
_LEAST_HEADS = 16
_MAX_PROGRAMS = 65535
_PRIORITY = 10


def supports(call: GatingCall) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    for name in ("a", "b", "A_log", "dt_bias"):
        x = getattr(call, name)
        if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
            return False, f"heads of {name} must be adjacent in memory"
    return True, ""


def run(call: GatingCall) -> None:
    """``gating_reference.run`` in one launch, or none where there are no tokens."""
    from ascend_patch.kernels.gdn.gating_kernel import gating_kernel

    if not call.a.numel():
        return
    device = call.a.device
    values, constants = arguments(call, "npu" if device.type == "npu" else "cuda")
    programs = vector_cores(device.index or 0) if device.type == "npu" else _MAX_PROGRAMS
    tiles = -(-call.a.shape[0] // constants["ROWS"])
    options = {} if device.type == "npu" else {"num_warps": 1}
    with on_device(device):
        gating_kernel[min(tiles, programs),](*values, **constants, **options)


def arguments(call: GatingCall, kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is launched or compiled with on a `cuda` or `npu`: (values, constants)."""
    tokens, heads = call.a.shape
    values = (call.a, call.b, call.A_log, call.dt_bias, call.g, call.beta)
    padded = 1 << (heads - 1).bit_length()
    constants = {
        "HV": heads,
        "HEADS": padded,
        "ROWS": max(1, _ELEMENTS[kind] // max(padded, _LEAST_HEADS)),
        "SOFTPLUS_BETA": float(call.softplus_beta),
        "THRESHOLD": float(call.threshold),
    }
    return (*values, tokens, call.a.stride(0), call.b.stride(0)), constants


def register(device: str = "cuda") -> None:
    """Offer the kernel on CUDA devices, or on NPUs."""
    dispatch.register(OPERATOR, device, dispatch.Implementation(NAME, run, supports, _PRIORITY))

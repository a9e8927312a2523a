"""apply_rotary through the Triton kernel: what it takes and how it is launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import tiles, triton_call
from ascend_patch.kernels.triton_device import on_device, vector_cores

OPERATOR = "apply_rotary"


def supports(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool
) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return False, f"elements of a row of {name} must be adjacent in memory"
    if x.numel() and x.shape[-2] > 1 and x.shape[-3] > 1 and x.stride(-2) > x.stride(-3):
        # The distance of two heads is compiled in. Here it would grow with the sequence.
        return False, "heads of x must lie closer together than its places: x is transposed"
    if x.device.type != "npu":
        return True, ""
    if torch.float64 in (cos.dtype, sin.dtype):
        return False, "cos and sin must not be float64: Ascend's vector units have none"
    if _ascend_tiles(x, cos, is_neox_style) is None:
        return False, "a head must fit the unified buffer of 192 KiB; head_size is too large"
    return True, ""


def apply_rotary_into(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool
) -> None:
    """``reference.apply_rotary_into`` in one launch, or none where there is nothing to turn."""
    tokens = x.shape[:-2].numel()
    if x.numel():
        launch(tokens, tokens, out, x, cos, sin, is_neox_style)


def warm(x: Tensor, cos: Tensor, sin: Tensor, *, is_neox_style: bool) -> bool:
    """Compile and load what calls like this one need, before a device graph is captured.

    The arguments are those of ``apply_rotary``; batch and sequence do not count, and no memory of
    theirs is read or written. Returns False where this kernel would not be used.
    """
    call = (torch.empty(x.shape, dtype=x.dtype, device=x.device), x, cos, sin, is_neox_style)
    choice = dispatch.select(OPERATOR, x.device.type, *call)
    if choice.implementation is None or choice.implementation.name != triton_call.NAME:
        return False
    for planned in tiles.VARIANTS[x.device.type]:
        launch(planned, 0, *call)
    return True


def register_on_npu() -> bool:
    """Offer the kernel on NPUs, once a self-test has admitted it; False without Ascend's Triton."""
    return triton_call.register_on_npu(OPERATOR, apply_rotary_into, supports)


def launch(planned: int, tokens: int, *call: Any) -> None:
    """Launch the variant for ``planned`` tokens over ``tokens`` of them; none is a warm-up."""
    from ascend_patch.kernels.rope.angles_kernel import angles_kernel

    device = call[1].device
    plan = plan_of(planned, *call)
    values, constants = arguments(tokens, plan, *call)
    npu = device.type == "npu"
    cores = vector_cores(device.index or 0) if npu else tiles.MAX_PROGRAMS
    grid = tiles.grid(plan, tokens, constants["HEADS"], 0, cores)
    options = {} if npu else {"num_warps": plan.num_warps}
    with on_device(device):
        angles_kernel[grid](*values, **constants, **options)


def plan_of(
    tokens: int, out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool
) -> tiles.Tiles:
    """The tiles of a call that ``supports`` accepted."""
    if x.device.type == "npu":
        plan = _ascend_tiles(x, cos, is_neox_style)
        assert plan is not None
        return plan
    return tiles.cuda_tiles(tokens, x.shape[-2], 0, x.shape[-1], 2 * cos.shape[-1])


def _ascend_tiles(x: Tensor, cos: Tensor, is_neox_style: bool) -> tiles.Tiles | None:
    sizes = (x.shape[-2], 0, x.shape[-1], 2 * cos.shape[-1], x.element_size())
    return tiles.ascend_tiles(*sizes, is_neox_style)


def arguments(
    tokens: int,
    plan: tiles.Tiles,
    out: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    is_neox_style: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``angles_kernel`` is launched or compiled with: (values, constants by name)."""
    places, heads, head_size = x.shape[-3:]
    values = (
        out,
        x,
        cos,
        sin,
        places,
        tokens,
        x.stride(0) if x.dim() == 4 else 0,
        x.stride(-3),
        # Angles of one sequence serve every batch entry.
        cos.stride(0) if cos.dim() == 3 else 0,
        cos.stride(-2),
        sin.stride(0) if sin.dim() == 3 else 0,
        sin.stride(-2),
    )
    constants = {
        "HEADS": heads,
        "TILE": plan.query_tile,
        "HEAD_STRIDE": x.stride(-2) if heads > 1 else head_size,
        "HEAD_SIZE": head_size,
        "HALF": cos.shape[-1],
        "HALF_PAD": plan.half_pad,
        "REST_PAD": plan.rest_pad,
        "NEOX": is_neox_style,
        "SPLIT": plan.split,
        "LOOPS": plan.loops,
    }
    return values, constants

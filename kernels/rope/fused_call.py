"""split_qkv_rmsnorm_rope through the Triton kernel: what it takes and how it is launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import tiles, triton_call
from ascend_patch.kernels.triton_device import on_device, vector_cores

OPERATOR = "split_qkv_rmsnorm_rope"


def supports(*call: Any) -> tuple[bool, str]:
    """Can the kernel take this call? Arguments are those of ``split_qkv_rmsnorm_rope_into``."""
    qkv, cos_sin_cache, vectors = call[4], call[6], call[7:11]
    if qkv.numel() and qkv.stride(-1) != 1:
        return False, "elements of a row of qkv must be adjacent in memory"
    if cos_sin_cache.stride(-1) != 1:
        return False, "elements of a row of cos_sin_cache must be adjacent in memory"
    if any(x is not None and x.numel() > 1 and x.stride(0) != 1 for x in vectors):
        return False, "weights and biases must be contiguous"
    if (call[9] is None) != (call[10] is None):
        return False, "q_bias and k_bias must be given together"
    if qkv.device.type != "npu":
        return True, ""
    if any(x is not None and x.dtype == torch.float64 for x in (cos_sin_cache, *vectors)):
        return False, "nothing may be float64: Ascend's vector units have none"
    if _sized(tiles.fused_ascend_tiles, *call) is None:
        return False, "a head must fit the unified buffer of 192 KiB; head_size is too large"
    return True, ""


def split_qkv_rmsnorm_rope_into(*call: Any) -> None:
    """``fused_reference.split_qkv_rmsnorm_rope_into`` in one launch, or none without tokens."""
    tokens = call[4].shape[0]
    if tokens:
        launch(tokens, tokens, *call)


def warm(
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    eps: float,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    is_neox_style: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    weight_offset: float = 0.0,
    has_gate: bool = False,
) -> bool:
    """Compile and load what calls like this one need, before a device graph is captured.

    The arguments are those of ``split_qkv_rmsnorm_rope``; the number of tokens does not count, and
    no memory of theirs is read or written. Returns False where this kernel would not be used.
    """
    tokens = qkv.shape[0]
    heads = [num_q_heads, num_kv_heads, num_kv_heads] + [num_q_heads] * has_gate
    out = [qkv.new_empty(tokens, n * head_size) for n in heads]
    call = (
        *out,
        *([] if has_gate else [None]),
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        q_bias,
        k_bias,
        num_q_heads,
        num_kv_heads,
        head_size,
        eps,
        is_neox_style,
        mrope_section,
        mrope_interleaved,
        weight_offset,
    )
    choice = dispatch.select(OPERATOR, qkv.device.type, *call)
    if choice.implementation is None or choice.implementation.name != triton_call.NAME:
        return False
    for planned in tiles.VARIANTS[qkv.device.type]:
        launch(planned, 0, *call)
    return True


def register_on_npu() -> bool:
    """Offer the kernel on NPUs, once a self-test has admitted it; False without Ascend's Triton."""
    return triton_call.register_on_npu(OPERATOR, split_qkv_rmsnorm_rope_into, supports)


def launch(planned: int, tokens: int, *call: Any) -> None:
    """Launch the variant for ``planned`` tokens over ``tokens`` of them; none is a warm-up."""
    device = call[4].device
    plan = plan_of(planned, *call)
    values, constants = arguments(tokens, plan, *call)
    npu = device.type == "npu"
    cores = vector_cores(device.index or 0) if npu else tiles.MAX_PROGRAMS
    grid = tiles.grid(plan, tokens, constants["QUERY_HEADS"], constants["KEY_HEADS"], cores)
    options = {} if npu else {"num_warps": plan.num_warps}
    with on_device(device):
        kernel_of(plan)[grid](*values, **constants, **options)


def kernel_of(_plan: tiles.Tiles) -> Any:
    """The kernel of every plan, imported with Triton when the first call needs it."""
    from ascend_patch.kernels.rope.fused_kernel import fused_kernel

    return fused_kernel


def plan_of(tokens: int, *call: Any) -> tiles.Tiles:
    """The tiles of a call that ``supports`` accepted."""
    if call[4].device.type == "npu":
        plan = _sized(tiles.fused_ascend_tiles, *call)
        assert plan is not None
        return plan
    return tiles.fused_cuda_tiles(tokens, call[11], call[12], call[13], call[6].shape[1])


def _sized(find: Any, *call: Any) -> tiles.Tiles | None:
    heads_and_size = call[11:14]
    found: tiles.Tiles | None = find(
        *heads_and_size, call[6].shape[1], call[4].element_size(), call[15]
    )
    return found


def arguments(
    tokens: int,
    plan: tiles.Tiles,
    out_q: Tensor,
    out_k: Tensor,
    out_v: Tensor,
    out_gate: Tensor | None,
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    eps: float,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
    weight_offset: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``fused_kernel`` is launched or compiled with: (values, constants by name)."""
    rows, rotary_dim = cos_sin_cache.shape
    by_axis = mrope_section is not None and positions.dim() == 2
    positions = positions if by_axis else positions.reshape(-1)
    time, height, width = mrope_section if by_axis and mrope_section else (0, 0, 0)
    values = (
        out_q,
        out_k,
        out_v,
        # Absent ones are never touched; a kernel takes no None for a pointer.
        out_q if out_gate is None else out_gate,
        qkv,
        positions,
        cos_sin_cache,
        q_weight,
        k_weight,
        q_weight if q_bias is None else q_bias,
        k_weight if k_bias is None else k_bias,
        tokens,
        rows,
        qkv.stride(0),
        positions.stride(0) if by_axis else 0,
        positions.stride(-1),
        cos_sin_cache.stride(0),
        float(eps),
        float(weight_offset),
    )
    constants = {
        "QUERY_HEADS": num_q_heads,
        "KEY_HEADS": num_kv_heads,
        "QUERY_TILE": plan.query_tile,
        "KEY_TILE": plan.key_tile,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": tiles.next_power_of_two(head_size),
        "HALF": rotary_dim // 2,
        "HALF_PAD": plan.half_pad,
        "REST_PAD": plan.rest_pad,
        "NEOX": is_neox_style,
        "GATE": out_gate is not None,
        "BIAS": q_bias is not None,
        "MROPE": by_axis,
        "TIME": time,
        "HEIGHT": height,
        "WIDTH": width,
        "INTERLEAVED": mrope_interleaved and by_axis,
        "SPLIT": plan.split,
        "LOOPS": plan.loops,
    }
    return values, constants

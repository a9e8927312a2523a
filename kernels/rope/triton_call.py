"""rotary_embedding through the Triton kernel: what it takes, how it is launched and warmed.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import tiles
from ascend_patch.kernels.triton_device import has_triton, on_device, vector_cores

NAME = "triton"
_PRIORITY = 10


def supports(
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    for name, x in (("query", query), ("key", key), ("cos_sin_cache", cos_sin_cache)):
        if x is not None and x.numel() and x.stride(-1) != 1 and x.shape[-1] != 1:
            return False, f"elements of a row of {name} must be adjacent in memory"
    if query.device.type != "npu":
        return True, ""
    if cos_sin_cache.dtype == torch.float64:
        return False, "cos_sin_cache must not be float64: Ascend's vector units have none"
    heads = _head_count(query, head_size), _head_count(key, head_size)
    sizes = (*heads, head_size, cos_sin_cache.shape[1], query.element_size())
    if tiles.ascend_tiles(*sizes, is_neox_style) is None:
        return False, "a head must fit the unified buffer of 192 KiB; head_size is too large"
    return True, ""


def rotary_embedding_into(
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> None:
    """``reference.rotary_embedding_into`` in one launch, or none where there are no tokens."""
    tokens = query.shape[0]
    if tokens and query.numel():
        _launch(
            tokens,
            tokens,
            out_query,
            out_key,
            positions,
            query,
            key,
            cos_sin_cache,
            head_size,
            is_neox_style,
            mrope_section,
            mrope_interleaved,
        )


def warm(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    *,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> bool:
    """Compile and load what calls like this one need, before a device graph is captured.

    The arguments are those of ``rotary_embedding``; dtypes, strides, head counts and options count,
    the number of tokens does not. Every variant of both forms is launched over no tokens: no memory
    is read or written. Returns False where this kernel would not be used.
    """
    rest = (head_size, is_neox_style, mrope_section, mrope_interleaved)
    fresh_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    fresh_key = None
    if key is not None:
        fresh_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    for out_query, out_key in ((fresh_query, fresh_key), (query, key)):
        call = (out_query, out_key, positions, query, key, cos_sin_cache, *rest)
        choice = dispatch.select("rotary_embedding", query.device.type, *call)
        if choice.implementation is None or choice.implementation.name != NAME:
            return False
        for tokens in tiles.VARIANTS[query.device.type]:
            _launch(tokens, 0, *call)
    return True


def register(operator: str, run: Any = rotary_embedding_into, verifier: Any = supports) -> None:
    """Offer a kernel where a GPU's Triton is installed.

    Not on an NPU yet: there it has been compiled and executed in its lowered form, and never run.
    Until a self-test at load compares it with the host's own kernel on the machine itself, the
    reference serves the cases that reach us. `register_on_npu` is what that test will call.
    """
    if has_triton("nvidia"):
        dispatch.register(operator, "cuda", _implementation(run, verifier))


def register_on_npu(
    operator: str, run: Any = rotary_embedding_into, verifier: Any = supports
) -> bool:
    """Offer a kernel on NPUs; whether this process has Triton for Ascend."""
    if not has_triton("ascend"):
        return False
    dispatch.register(operator, "npu", _implementation(run, verifier))
    return True


def _implementation(run: Any, verifier: Any) -> dispatch.Implementation:
    return dispatch.Implementation(NAME, run, verifier, _PRIORITY)


def _launch(planned: int, tokens: int, *call: Any) -> None:
    """Launch the variant for ``planned`` tokens over ``tokens`` of them."""
    device = call[3].device
    plan = plan_of(planned, *call)
    values, constants = arguments(tokens, plan, *call)
    cores = vector_cores(device.index or 0) if device.type == "npu" else tiles.MAX_PROGRAMS
    heads = constants["QUERY_HEADS"], constants["KEY_HEADS"]
    options = {} if device.type == "npu" else {"num_warps": plan.num_warps}
    with on_device(device):
        kernel_of(plan)[tiles.grid(plan, tokens, *heads, cores)](*values, **constants, **options)


def kernel_of(plan: tiles.Tiles) -> Any:
    """The kernel that a plan is for; both take what ``arguments`` returns."""
    if plan.early:
        from ascend_patch.kernels.rope.early_kernel import early_kernel

        return early_kernel
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    return rotary_kernel


def plan_of(
    tokens: int,
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    *_mrope: Any,
) -> tiles.Tiles:
    """The tiles of a call that ``supports`` accepted."""
    sizes = (_head_count(query, head_size), _head_count(key, head_size), head_size)
    rotary_dim = cos_sin_cache.shape[1]
    if query.device.type != "npu":
        return tiles.cuda_tiles(tokens, *sizes, rotary_dim)
    plan = tiles.ascend_tiles(*sizes, rotary_dim, query.element_size(), is_neox_style)
    assert plan is not None
    return plan


def arguments(
    tokens: int,
    plan: tiles.Tiles,
    out_query: Tensor,
    out_key: Tensor | None,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    is_neox_style: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``rotary_kernel`` is launched or compiled with: (values, constants by name)."""
    rows, rotary_dim = cos_sin_cache.shape
    by_axis = mrope_section is not None and positions.dim() == 2
    positions = positions if by_axis else positions.reshape(-1)
    time, height, width = mrope_section if by_axis and mrope_section else (0, 0, 0)
    key_heads = _head_count(key, head_size)
    if key is None or out_key is None:
        # Never touched; a kernel takes no None for a pointer.
        key, out_key = query, out_query
    rest = head_size - rotary_dim
    values = (
        out_query,
        out_key,
        query,
        key,
        positions,
        cos_sin_cache,
        tokens,
        rows,
        out_query.stride(0),
        out_key.stride(0),
        query.stride(0),
        key.stride(0),
        positions.stride(0) if by_axis else 0,
        positions.stride(-1),
        cos_sin_cache.stride(0),
    )
    constants = {
        "QUERY_HEADS": _head_count(query, head_size),
        "KEY_HEADS": key_heads,
        "QUERY_TILE": plan.query_tile,
        "KEY_TILE": plan.key_tile,
        "QUERY_HEAD_STRIDE": _head_stride(query, head_size),
        "KEY_HEAD_STRIDE": _head_stride(key, head_size),
        "OUT_QUERY_HEAD_STRIDE": _head_stride(out_query, head_size),
        "OUT_KEY_HEAD_STRIDE": _head_stride(out_key, head_size),
        "REST": rest,
        "HALF": rotary_dim // 2,
        "HALF_PAD": plan.half_pad,
        "REST_PAD": plan.rest_pad,
        "NEOX": is_neox_style,
        "COPY_REST": rest > 0 and out_query is not query,
        "MROPE": by_axis,
        "TIME": time,
        "HEIGHT": height,
        "WIDTH": width,
        "INTERLEAVED": mrope_interleaved and by_axis,
        "SPLIT": plan.split,
        "LOOPS": plan.loops,
        "SHARED_ROW": plan.shared_row,
    }
    return values, constants


def _head_count(x: Tensor | None, head_size: int) -> int:
    if x is None:
        return 0
    return int(x.shape[1]) if x.dim() == 3 else int(x.shape[1]) // head_size


def _head_stride(x: Tensor, head_size: int) -> int:
    return int(x.stride(1)) if x.dim() == 3 else head_size

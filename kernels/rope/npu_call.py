"""The rotary operators of torch_npu, ``npu_rotary_mul`` and ``npu_mrope``, within their limits.

The limits are those that torch_npu's documentation states for Atlas A2 and A3. What it does not
state is how often a bfloat16 or float16 result is rounded. So none of these serves until a
self-test on the machine itself has compared it with the reference: ``admit`` is what that test
calls. They rank below the Triton kernel, which reads strided slices and writes its results where
they belong; these copy before, after, or both.

Nothing here imports torch_npu: its operators are there once somebody else has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import reference

ROTARY_MUL, MROPE = "npu_rotary_mul", "npu_mrope"
# Below triton_call's; npu_mrope takes query and key in one launch.
_PRIORITIES = {ROTARY_MUL: 3, MROPE: 4}

_WIDEST_HEAD = 896
_MOST_ROWS = 1000
# The sections of the model that npu_mrope was made for. [0, 0, 0] is its word for plain RoPE.
_SECTIONS = ((16, 24, 24),)
_PLAIN = (0, 0, 0)


def admit(operator: str, name: str) -> bool:
    """Offer ``name`` (``npu_rotary_mul`` or ``npu_mrope``) for ``operator`` on NPUs.

    ``operator``: ``rotary_embedding``, or ``apply_rotary``, which only the first one serves. To be
    called once its results on this machine have been compared with the reference's. False where
    this torch_npu has no such operator. Raises KeyError for a pair that does not exist.
    """
    implementation = IMPLEMENTATIONS[operator, name]
    if not hasattr(torch.ops.npu, name):
        return False
    dispatch.register(operator, "npu", implementation)
    return True


def mul_supports(batch: int, heads: int, width: int, style: bool) -> tuple[bool, str]:
    """npu_rotary_mul's limits for [batch, s, heads, width] and angles [1, s, 1, width]."""
    if width >= _WIDEST_HEAD:
        return False, f"rotary_dim must be below {_WIDEST_HEAD}"
    if heads >= _MOST_ROWS or batch >= _MOST_ROWS:
        return False, f"batch and heads must each be below {_MOST_ROWS}"
    if not style and batch * heads >= _MOST_ROWS:
        return False, f"batch times heads must be below {_MOST_ROWS} in GPT-J style"
    return True, ""


def _same_dtype(x: Tensor, *angles: Tensor) -> tuple[bool, str]:
    # Cast to x's dtype, the angles would be rounded: an error of their own, before any arithmetic.
    if any(angle.dtype != x.dtype for angle in angles):
        return False, "cosines and sines must have the dtype of what they turn"
    return True, ""


def _turn(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> None:
    """x, out [b, s, h, d]; cos, sin [s, rotary_dim/2], by npu_rotary_mul as BSND with 1S1D."""
    width = 2 * cos.shape[-1]
    if is_neox_style:
        cos, sin = (torch.cat((angle, angle), dim=-1) for angle in (cos, sin))
    else:
        cos, sin = (angle.repeat_interleave(2, dim=-1) for angle in (cos, sin))
    cos, sin = (angle[None, :, None, :].contiguous() for angle in (cos, sin))
    mode = "half" if is_neox_style else "interleave"
    turned = torch.ops.npu.npu_rotary_mul(x[..., :width].contiguous(), cos, sin, mode)
    out[..., :width].copy_(turned)
    if width < x.shape[-1] and out is not x:
        out[..., width:].copy_(x[..., width:])


def angles_supports(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool
) -> tuple[bool, str]:
    """Can npu_rotary_mul take this call of apply_rotary?"""
    ok, reason = _same_dtype(x, cos, sin)
    if not ok:
        return ok, reason
    batch = x.shape[0] if x.dim() == 4 and cos.dim() == 2 else 1
    return mul_supports(batch, x.shape[-2], 2 * cos.shape[-1], is_neox_style)


def angles_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> None:
    """``reference.apply_rotary_into`` through npu_rotary_mul."""
    if not x.numel():
        return
    if x.dim() == 3 or cos.dim() == 3:
        # Angles of each batch entry: one long sequence, for GPT-J style takes no others.
        shape = (1, x.shape[:-2].numel(), *x.shape[-2:])
        half = cos.shape[-1]
        _turn(
            out.view(shape),
            x.reshape(shape),
            cos.reshape(-1, half),
            sin.reshape(-1, half),
            is_neox_style,
        )
        return
    _turn(out, x, cos, sin, is_neox_style)


def rotary_mul_supports(
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
    """Can npu_rotary_mul take this call of rotary_embedding? The angles are gathered by torch."""
    ok, reason = _same_dtype(query, cos_sin_cache)
    if not ok:
        return ok, reason
    heads = max(x.shape[1:].numel() // head_size for x in (query, key) if x is not None)
    return mul_supports(1, heads, cos_sin_cache.shape[1], is_neox_style)


def rotary_mul_into(
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
    """``reference.rotary_embedding_into`` through npu_rotary_mul, once for query and for key."""
    if not query.shape[0]:
        return
    angles = reference.gather_cos_sin(positions, cos_sin_cache, mrope_section, mrope_interleaved)
    # Back to the dtype that they were gathered in: exact.
    cos, sin = (angle.to(query.dtype) for angle in angles)
    for out, x in ((out_query, query), (out_key, key)):
        if out is not None and x is not None and x.numel():
            heads = (1, x.shape[0], x.shape[1:].numel() // head_size, head_size)
            view = x.unflatten(1, heads[2:])[None] if x.dim() == 2 else x[None]
            target = view if out is x else out.view(heads)
            _turn(target, view, cos, sin, is_neox_style)


def mrope_supports(
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
    """Can npu_mrope take this call of rotary_embedding?"""
    if key is None:
        return False, "key must be given"
    ok, reason = _same_dtype(query, cos_sin_cache)
    if not ok:
        return ok, reason
    multiple = 16 if query.dtype == torch.float32 else 32
    if head_size % multiple or cos_sin_cache.shape[1] % multiple:
        return False, f"head_size and rotary_dim must be multiples of {multiple} for {query.dtype}"
    if mrope_section is None or positions.dim() == 1:
        return True, ""
    if mrope_interleaved:
        return False, "mrope_section must be in chunks, not interleaved"
    if tuple(mrope_section) not in _SECTIONS:
        return False, f"mrope_section must be one of {[list(s) for s in _SECTIONS]}"
    return True, ""


def mrope_into(
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
    """``reference.rotary_embedding_into`` through npu_mrope, in one launch for query and key."""
    if key is None or out_key is None or not query.shape[0]:
        return
    by_axis = mrope_section is not None and positions.dim() == 2
    # The operator looks rows up unchecked: outside the cache it would read past it. Before
    # torch_npu 2.10 it is documented to take int64 alone.
    positions = positions.clamp(0, cos_sin_cache.shape[0] - 1).long()
    found = torch.ops.npu.npu_mrope(
        (positions if by_axis else positions.reshape(-1)).contiguous(),
        query.reshape(query.shape[0], -1).contiguous(),
        key.reshape(key.shape[0], -1).contiguous(),
        cos_sin_cache.contiguous(),
        head_size,
        mrope_section=list(mrope_section) if by_axis and mrope_section else list(_PLAIN),
        rotary_mode="half" if is_neox_style else "interleaved",
    )
    for out, turned in zip((out_query, out_key), found, strict=True):
        out.copy_(turned.view(out.shape))


def _implementation(name: str, run: Any, supports: Any) -> dispatch.Implementation:
    return dispatch.Implementation(name, run, supports, _PRIORITIES[name])


IMPLEMENTATIONS = {
    ("rotary_embedding", MROPE): _implementation(MROPE, mrope_into, mrope_supports),
    ("rotary_embedding", ROTARY_MUL): _implementation(
        ROTARY_MUL, rotary_mul_into, rotary_mul_supports
    ),
    ("apply_rotary", ROTARY_MUL): _implementation(ROTARY_MUL, angles_into, angles_supports),
}

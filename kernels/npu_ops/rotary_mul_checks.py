"""What the documentation of npu_rotary_mul rules out on Atlas A2 and A3.

The operator has no argument for its layout: a call is refused when no layout that it supports
explains the shapes.
"""

from __future__ import annotations

from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.rotary_checks import floats
from ascend_patch.kernels.npu_ops.settings import torch_npu_at_least

_WIDEST_HEAD = 896
_ROWS = 1000
_BLOCK = 32  # bytes
# Layout of 4-D input -> where its batch, sequence and heads are.
_LAYOUTS = {"BNSD": (0, 2, 1), "BSND": (0, 1, 2), "SBND": (1, 0, 2)}


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, mode: str, rotate: Tensor | None) -> None:
    """Modes, dtypes, D below 896 and even, batch and heads below 1000, shapes per layout."""
    operator = "npu_rotary_mul"
    if mode not in ("half", "interleave"):
        raise OperatorError(f"{operator}: rotary_mode must be half or interleave, not {mode!r}")
    floats(operator, input=x, r1=r1, r2=r2)
    if r1.shape != r2.shape:
        raise OperatorError(
            f"{operator}: r1 {list(r1.shape)} and r2 {list(r2.shape)} must have the same shape"
        )
    flat_since = "2.8.0.post2"
    dims = (3, 4) if torch_npu_at_least(flat_since) else (4,)
    if x.dim() not in dims or r1.dim() != x.dim():
        raise OperatorError(
            f"{operator}: input has {x.dim()} dimensions and r1 {r1.dim()}; both must have 4, or "
            f"3 (TND, since torch_npu {flat_since})"
        )
    width = x.shape[-1]
    if width >= _WIDEST_HEAD or width % 2 or not width:
        raise OperatorError(
            f"{operator}: the last dimension of input is {width}; it must be even and below "
            f"{_WIDEST_HEAD}"
        )
    if r1.shape[-1] != width:
        raise OperatorError(
            f"{operator}: r1 and r2 are {r1.shape[-1]} wide and input {width}; they must be as "
            "wide as it"
        )
    if rotate is not None:
        _matrix(rotate, width)
    _layout(x, r1, mode == "half")


def _matrix(rotate: Tensor, width: int) -> None:
    operator, since = "npu_rotary_mul", "2.10.0"
    if not torch_npu_at_least(since):
        raise OperatorError(f"{operator}: rotate exists since torch_npu {since}; leave it out")
    floats(operator, rotate=rotate)
    if tuple(rotate.shape) != (width, width):
        raise OperatorError(
            f"{operator}: rotate is {list(rotate.shape)} for an input whose last dimension is "
            f"{width}; it must be [{width}, {width}]"
        )


def _layout(x: Tensor, r1: Tensor, half: bool) -> None:
    """Refuse what no layout explains: first by the shape of the angles, then by its limits."""
    operator, shape, angles = "npu_rotary_mul", tuple(x.shape[:-1]), tuple(r1.shape[:-1])
    reasons = []
    if x.dim() == 3:
        tokens, heads = shape
        if angles == (tokens, 1) or (half and angles == shape):
            if heads < _ROWS:
                return
            reasons.append(f"TND needs fewer than {_ROWS} heads")
    else:
        for layout, (b, s, n) in _LAYOUTS.items():
            batch, tokens, heads = shape[b], shape[s], shape[n]
            fits = [_place(b, s, n, 1, tokens, 1)]
            if half:
                fits += [_place(b, s, n, batch, tokens, 1), shape]
            if angles not in fits:
                continue
            limit = "B and N" if half else "B * N"
            if (max(batch, heads) if half else batch * heads) >= _ROWS:
                reasons.append(f"{layout} needs {limit} below {_ROWS}, not {batch} and {heads}")
            elif half and layout == "BNSD" and _too_broad(x, r1):
                reasons.append("BNSD needs more tokens than that for so many B * N")
            else:
                return
    if reasons:
        raise OperatorError(f"{operator}: input {list(x.shape)}: {'; '.join(reasons)}")
    mode, choices = (
        ("half", "11SD, B1SD or BNSD; 1S1D, BS1D or BSND; S11D, SB1D or SBND; T1D or TND")
        if half
        else ("interleave", "11SD; 1S1D; S11D; T1D")
    )
    raise OperatorError(
        f"{operator}: r1 {list(r1.shape)} for input {list(x.shape)} is none of the shapes that "
        f"{mode} takes for BNSD, BSND, SBND and TND inputs: {choices}"
    )


def _too_broad(x: Tensor, r1: Tensor) -> bool:
    """Angles of BNSD that are spread over batch and heads: aclnnRotaryPositionEmbedding's limit."""
    batch, heads, tokens, width = x.shape
    if min(batch, heads) == 1 or tuple(r1.shape[:2]) != (1, 1):
        return False
    if width // 2 * x.element_size() % _BLOCK == 0:
        return bool(batch * heads > 8 * tokens)
    # More vector cores than the 40 of the smallest A2 leave each with fewer tokens still.
    return bool(width < 80 and 2 * batch * heads > -(tokens // -40))


def _place(b: int, s: int, n: int, batch: int, tokens: int, heads: int) -> tuple[int, ...]:
    at = {b: batch, s: tokens, n: heads}
    return at[0], at[1], at[2]

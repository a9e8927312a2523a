"""What the operators ask of a compressed mask, the 2048 x 2048 one of sparse modes 2, 3 and 4."""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError

SIDE = 2048
SHAPES = ((SIDE, SIDE), (1, SIDE, SIDE), (1, 1, SIDE, SIDE))

# Masks that were read and found right, with the version of their content then.
_right: dict[int, tuple[weakref.ref[Tensor], int]] = {}


@functools.cache
def _expected() -> Tensor:
    return torch.triu(torch.ones(SIDE, SIDE, dtype=torch.uint8), diagonal=1)


def check_compressed(operator: str, mask: Tensor | None, sparse_mode: int) -> None:
    """Raise OperatorError unless ``mask`` is the plain one: 1 above the diagonal, 0 elsewhere.

    The operators look only at parts of it and trust its content. Any other content is a mistake of
    the caller's, whose effect on an NPU depends on the tiles.
    """
    if mask is None:
        raise OperatorError(
            f"{operator}: atten_mask is missing; sparse_mode={sparse_mode} needs the compressed "
            f"mask of shape ({SIDE}, {SIDE}) with 1 above the diagonal"
        )
    if tuple(mask.shape) not in SHAPES:
        raise OperatorError(
            f"{operator}: atten_mask has shape {tuple(mask.shape)}; sparse_mode={sparse_mode} "
            f"needs the compressed mask of shape ({SIDE}, {SIDE}), whatever the lengths are"
        )
    if _known(mask):
        return
    plain = mask.reshape(SIDE, SIDE).contiguous().view(torch.uint8)
    # As words of 8 bytes: the comparison runs once a call where tensors have no version.
    if not torch.equal(plain.view(torch.int64), _expected().view(torch.int64)):
        wrong = int((plain != _expected()).sum())
        raise OperatorError(
            f"{operator}: atten_mask differs from the plain causal mask in {wrong} places; "
            f"sparse_mode={sparse_mode} needs exactly 1 above the diagonal and 0 elsewhere"
        )
    if not mask.is_inference():
        _right[id(mask)] = (weakref.ref(mask, _forget(id(mask))), mask._version)


def _known(mask: Tensor) -> bool:
    found = _right.get(id(mask))
    if found is None or mask.is_inference():
        return False
    # The comparison is for the reader of a dead reference, whose number another mask got.
    return bool(found[1] == mask._version) and found[0]() is mask


def _forget(key: int) -> functools.partial[None]:
    return functools.partial(_drop, key)


def _drop(key: int, _reference: object) -> None:
    _right.pop(key, None)

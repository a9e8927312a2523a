"""The documented limits of sparse modes and masks of fused inference attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import masks
from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem

_MODES = (0, 1, 2, 3, 4)
_COMPRESSED = (2, 3, 4)
_MULTI_HEAD_MODES = (0, 3, 4)
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)


def check(problem: Problem) -> None:
    """Raise OperatorError for the first limit that the call breaks."""
    mask, mode = problem.mask, problem.sparse_mode
    if mode not in _MODES:
        raise problem.error(f"sparse_mode={mode}; it must be one of 0, 1, 2, 3 and 4")
    multi_head = problem.ragged and problem.heads == problem.kv_heads
    if problem.newer and multi_head and mode not in _MULTI_HEAD_MODES:
        raise problem.error(
            f"sparse_mode={mode} in {problem.layout} with as many key/value heads as query heads; "
            "it must be 0, 3 or 4"
        )
    if mask is not None:
        if mask.dtype not in _MASK_DTYPES:
            raise problem.error(f"atten_mask is {mask.dtype}; it must be bool, int8 or uint8")
        if not mask.is_contiguous():
            raise problem.error("atten_mask is not contiguous; call .contiguous() on it")
    if mode in _COMPRESSED:
        if not problem.single or mask is not None:
            masks.check_compressed(problem.operator, mask, mode)
        if mode == 4 and problem.pre_tokens + problem.next_tokens < 0:
            raise problem.error(
                f"pre_tokens={problem.pre_tokens} and next_tokens={problem.next_tokens} leave "
                "nothing between them; their sum must not be negative"
            )
        return
    if mask is None:
        if mode == 1:
            raise problem.error("atten_mask is missing; sparse_mode=1 needs it in full")
        return
    if problem.ragged:
        raise problem.error(
            f"atten_mask in full with input_layout={problem.layout!r}; "
            "use sparse_mode 2, 3 or 4 with the compressed mask"
        )
    _check_full_mask(problem, mask)


def _check_full_mask(problem: Problem, mask: Tensor) -> None:
    batch, rows = problem.batch, problem.query_rows
    if problem.block_table is not None:
        columns = problem.block_table.shape[1] * problem.block_size
    else:
        columns = problem.key.shape[problem.letters.index("S")]
    first = batch if problem.single else rows
    fits = {2: ((first,),), 3: ((1, rows),), 4: ((batch, 1, rows), (1, 1, rows))}
    enough = [shape for shape in fits.get(mask.dim(), ()) if _covers(mask.shape[:-1], shape)]
    if not enough or mask.shape[-1] < columns:
        raise problem.error(
            f"atten_mask has shape {tuple(mask.shape)}; sparse_mode={problem.sparse_mode} needs "
            f"({first}, {columns}), (1, {rows}, {columns}), ({batch}, 1, {rows}, {columns}) or "
            f"(1, 1, {rows}, {columns})"
        )


def _covers(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Rows may be padded; whatever counts requests may not."""
    return tuple(found[:-1]) == tuple(wanted[:-1]) and found[-1] >= wanted[-1]

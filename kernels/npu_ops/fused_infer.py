"""npu_fused_infer_attention_score, its second version, ``.out`` variants and workspace queries.

Formula: softmax(scale * QK^T + mask) V, from torch_npu's documentation of the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import fused_infer_checks, fused_infer_run
from ascend_patch.kernels.npu_ops.fused_infer_problem import V1, V2, Problem, first, second


def npu_fused_infer_attention_score(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Attention over dense or paged keys and values; the arguments are the schema's.

    Args:
        query: [B, S, N * D], [B, S, N, D], [B, N, S, D], [T, N, D] or [N, T, D], as
            ``input_layout`` says; float16 or bfloat16.
        key, value: The same with KV_N heads, or with ``block_table`` a cache: [blocks, block_size,
            KV_N * D], or for BNSD and TND also [blocks, KV_N, block_size, D].
        actual_seq_lengths: Per request; in TND the cumulative ends.
        actual_seq_lengths_kv: Per request with ``block_table``; without it cumulative in TND.

    Returns:
        (attention_out in the query's dtype, softmax_lse in float32: [B, N, S, 1], in TND [T, N, 1],
        or one 0 where it was not asked for).

    Raises:
        OperatorError: a documented limit is broken, or the emulation does not know an argument.
    """
    return _answer(first(*args, **kwargs))


def npu_fused_infer_attention_score_v2(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The second version: other names, and ``learnable_sink`` [N], a logit per head.

    Arguments, results and errors otherwise as npu_fused_infer_attention_score.
    """
    return _answer(second(*args, **kwargs))


def _answer(problem: Problem) -> tuple[Tensor, Tensor]:
    fused_infer_checks.check(problem)
    return fused_infer_run.run(problem)


def _written(operator: str, found: tuple[Tensor, Tensor], out: Sequence[Tensor]) -> Any:
    fused_infer_checks.check_out(operator, found, out)
    for target, source in zip(out, found, strict=True):
        target.copy_(source.view(target.shape))
    return out[0], out[1]


def v1_out(
    *args: Any, workspace: Tensor | None = None, out: Sequence[Tensor], **kwargs: Any
) -> Any:
    """The ``.out`` variant: writes ``out`` = [attention_out, softmax_lse] and returns them."""
    return _written(V1, npu_fused_infer_attention_score(*args, **kwargs), out)


def v2_out(
    *args: Any, workspace: Tensor | None = None, out: Sequence[Tensor], **kwargs: Any
) -> Any:
    """The ``.out`` variant of the second version."""
    return _written(V2, npu_fused_infer_attention_score_v2(*args, **kwargs), out)


def v1_workspace(*args: Any, **kwargs: Any) -> Tensor:
    """A workspace, uint8, after the same checks; its size says nothing about an NPU's."""
    return _workspace(first(*args, **kwargs))


def v2_workspace(*args: Any, **kwargs: Any) -> Tensor:
    """As ``v1_workspace``, for the second version."""
    return _workspace(second(*args, **kwargs))


def _workspace(problem: Problem) -> Tensor:
    fused_infer_checks.check(problem)
    return torch.empty(max(1, problem.query.numel()), dtype=torch.uint8)


KERNELS = {
    "npu::npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu::npu_fused_infer_attention_score.out": v1_out,
    "npu::_npu_fused_infer_attention_score_get_max_workspace": v1_workspace,
    "npu::npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
    "npu::npu_fused_infer_attention_score_v2.out": v2_out,
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": v2_workspace,
}

"""npu_fused_infer_attention_score, its second version, ``.out`` variants and workspace queries.

Formula: softmax(scale * QK^T + mask) V, from torch_npu's documentation of the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import fused_infer_checks, fused_infer_run
from ascend_patch.kernels.npu_ops.fused_infer_problem import V1, V2, Problem

_MOST = 2147483647


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = _MOST,
    next_tokens: int = _MOST,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over dense or paged keys and values.

    Args:
        query: [B, S, N * D], [B, S, N, D], [B, N, S, D], [T, N, D] or [N, T, D], as
            ``input_layout`` says; float16 or bfloat16.
        key, value: The same with KV_N heads, or with ``block_table`` a cache: [blocks, block_size,
            KV_N * D], or for BNSD and TND also [blocks, KV_N, block_size, D].
        actual_seq_lengths: Per request; in TND the cumulative ends.
        actual_seq_lengths_kv: Per request with ``block_table``; without it cumulative in TND.
        others: What the emulation does not know; anything but its default is refused.

    Returns:
        (attention_out in the query's dtype, softmax_lse in float32: [B, N, S, 1], in TND [T, N, 1],
        or one 0 where it was not asked for).

    Raises:
        OperatorError: a documented limit is broken.
    """
    problem = Problem(
        V1, query, key, value, atten_mask, actual_seq_lengths, actual_seq_lengths_kv, block_table,
        block_size, num_heads, num_key_value_heads, scale, input_layout, sparse_mode, pre_tokens,
        next_tokens, inner_precise, softmax_lse_flag, None, key_antiquant_scale,
        key_antiquant_offset, value_antiquant_scale, value_antiquant_offset, key_antiquant_mode,
        value_antiquant_mode, others,
    )  # fmt: skip
    return _answer(problem)


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = _MOST,
    next_tokens: int = _MOST,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The second version: other names, and ``learnable_sink`` [N], a logit per head.

    Arguments, results and errors otherwise as npu_fused_infer_attention_score.
    """
    problem = Problem(
        V2, query, key, value, atten_mask, actual_seq_qlen, actual_seq_kvlen, block_table,
        block_size, num_query_heads, num_key_value_heads, softmax_scale, input_layout, sparse_mode,
        pre_tokens, next_tokens, inner_precise, return_softmax_lse, learnable_sink,
        dequant_scale_key, dequant_offset_key, dequant_scale_value, dequant_offset_value,
        key_quant_mode, value_quant_mode, others,
    )  # fmt: skip
    return _answer(problem)


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


def v1_workspace(query: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """A workspace, uint8; its size says nothing about an NPU's."""
    return torch.empty(max(1, query.numel()), dtype=torch.uint8)


KERNELS = {
    "npu::npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu::npu_fused_infer_attention_score.out": v1_out,
    "npu::_npu_fused_infer_attention_score_get_max_workspace": v1_workspace,
    "npu::npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
    "npu::npu_fused_infer_attention_score_v2.out": v2_out,
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": v1_workspace,
}

"""ATB's attention operators: paged decode, prefill, and prefill over a paged cache.

torch_npu documents none of them; their shapes are those of its own operator tests and of
vllm-ascend's calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import blocks, paged_checks, softmax

# What ATB multiplies a bfloat16 mask by; a float16 one is added as it is.
_MASK_FACTOR = -10000.0


def _npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Decode: each token is a request of its own and sees its whole context.

    Args:
        query: [T, N, D], float16 or bfloat16.
        key_cache: [blocks, block_size, KV_N, D]; value_cache: [blocks, block_size, KV_N, Dv].
        block_table: [T, entries] int32; entries beyond a context may hold anything.
        context_lens: [T] int32, the tokens in the cache, this one included.
        out: [T, N, Dv], written; a context of 0 gives 0.

    Raises:
        OperatorError: shapes, dtypes or lengths do not fit together.
    """
    lens, result = _check_decode(
        query, key_cache, value_cache, num_kv_heads, num_heads, block_table, context_lens, out
    )
    for index, length in enumerate(lens):
        found = _paged(
            query[index : index + 1], key_cache, value_cache, block_table[index], length,
            scale_value, None,
        )  # fmt: skip
        result[index] = found[0]


def _check_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> tuple[list[int], Tensor]:
    """The contexts' lengths, and ``out`` as [T, N, Dv]."""
    operator = "_npu_paged_attention"
    paged_checks.check_heads(operator, query, num_heads, num_kv_heads)
    paged_checks.check_cache(operator, query, key_cache, value_cache, num_kv_heads)
    lens = paged_checks.lengths(operator, "context_lens", context_lens)
    paged_checks.check_count(operator, "context_lens", len(lens), query.shape[0])
    paged_checks.check_table(operator, block_table, lens, key_cache)
    return lens, paged_checks.room(operator, out, query, value_cache.shape[-1])


def _npu_paged_attention_get_workspace(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """A workspace for _npu_paged_attention, uint8; its size says nothing about an NPU's."""
    _check_decode(
        query, key_cache, value_cache, num_kv_heads, num_heads, block_table, context_lens, out
    )
    return torch.empty(max(1, query.numel()), dtype=torch.uint8)


def _npu_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Prefill without a cache.

    Args:
        query: [T, N, D]; key: [T, KV_N, D]; value: [T, KV_N, Dv].
        mask: [S, S] of the query's dtype, for sequences of up to S tokens. In float16 it is added
            to the scores; in bfloat16 it is multiplied by -10000 first.
        seq_len: [B] int32, the tokens of each sequence.
        out: [T, N, Dv], written; rows of no sequence are left.

    Raises:
        OperatorError: shapes, dtypes or lengths do not fit together.
    """
    operator = "_npu_flash_attention"
    paged_checks.check_heads(operator, query, num_heads, num_kv_heads)
    paged_checks.check_fresh(operator, query, key, value, num_kv_heads)
    lens = paged_checks.lengths(operator, "seq_len", seq_len)
    paged_checks.check_total(operator, "seq_len", sum(lens), query.shape[0])
    paged_checks.check_square_mask(operator, mask, query, max(lens, default=0))
    result = paged_checks.room(operator, out, query, value.shape[-1])
    _prefill(query, key, value, lens, scale_value, mask, result)


def _npu_flash_attention_unpad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Prefill without a cache and without a mask; arguments as ``_npu_flash_attention``."""
    operator = "_npu_flash_attention_unpad"
    paged_checks.check_heads(operator, query, num_heads, num_kv_heads)
    paged_checks.check_fresh(operator, query, key, value, num_kv_heads)
    lens = paged_checks.lengths(operator, "seq_len", seq_len)
    paged_checks.check_total(operator, "seq_len", sum(lens), query.shape[0])
    result = paged_checks.room(operator, out, query, value.shape[-1])
    _prefill(query, key, value, lens, scale_value, None, result)


def _npu_flash_attention_qlens(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    context_lens: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    """Causal prefill over a paged cache that holds this call's keys and values too.

    Args:
        query: [T, N, D]; caches as of ``_npu_paged_attention``.
        mask: [128, 128] of the query's dtype: 0, and above the diagonal what hides a column (-inf
            in float16, 1 in bfloat16).
        seq_len: [B] int32, the query tokens of each request; context_lens: [B] int32, its tokens
            in the cache, the new ones included.
        out: [T, N, Dv], written; rows of no request are left.

    Raises:
        OperatorError: shapes, dtypes or lengths do not fit together.
    """
    operator = "_npu_flash_attention_qlens"
    paged_checks.check_heads(operator, query, num_heads, num_kv_heads)
    paged_checks.check_cache(operator, query, key_cache, value_cache, num_kv_heads)
    lens = paged_checks.lengths(operator, "seq_len", seq_len)
    contexts = paged_checks.lengths(operator, "context_lens", context_lens)
    paged_checks.check_total(operator, "seq_len", sum(lens), query.shape[0])
    paged_checks.check_count(operator, "context_lens", len(contexts), len(lens))
    paged_checks.check_contexts(operator, lens, contexts)
    paged_checks.check_table(operator, block_table, contexts, key_cache)
    paged_checks.check_causal_mask(operator, mask, query)
    result = paged_checks.room(operator, out, query, value_cache.shape[-1])
    first = 0
    for index, (rows, context) in enumerate(zip(lens, contexts, strict=True)):
        own = slice(first, first + rows)
        hidden = softmax.band(rows, slice(0, context), context - rows, context, 0)
        result[own] = _paged(
            query[own], key_cache, value_cache, block_table[index], context, scale_value, hidden
        )
        first += rows


def _paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    length: int,
    scale: float,
    hidden: Tensor | None,
) -> Tensor:
    seen = slice(0, length)
    key, value = (
        blocks.gather(cache, table, seen, cache.shape[2], heads_first=False)
        for cache in (key_cache, value_cache)
    )
    return softmax.attend(query, key, value, scale, hidden)[0].to(query.dtype)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lens: list[int],
    scale: float,
    mask: Tensor | None,
    result: Tensor,
) -> None:
    first = 0
    for rows in lens:
        own = slice(first, first + rows)
        bias = None
        if mask is not None:
            bias = mask[:rows, :rows].float()
            bias = bias if mask.dtype == torch.float16 else bias * _MASK_FACTOR
        found = softmax.attend(query[own], key[own], value[own], scale, bias=bias)
        result[own] = found[0].to(query.dtype)
        first += rows


KERNELS = {
    "atb::_npu_paged_attention": _npu_paged_attention,
    "atb::_npu_paged_attention_get_workspace": _npu_paged_attention_get_workspace,
    "atb::_npu_flash_attention": _npu_flash_attention,
    "atb::_npu_flash_attention_unpad": _npu_flash_attention_unpad,
    "atb::_npu_flash_attention_qlens": _npu_flash_attention_qlens,
}

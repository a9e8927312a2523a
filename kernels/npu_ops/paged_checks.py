"""What ATB's attention operators ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.settings import allowed

_MASK_SIDE = 128
# ATB's own checks: head sizes, and the block size above a head size.
_WIDEST_HEAD, _WIDE_HEAD, _MOST_WIDE = 576, 256, 128


def check_heads(operator: str, query: Tensor, heads: int, kv_heads: int) -> None:
    """query [T, N, D] of a dtype that the operator takes, with N a multiple of KV_N."""
    takes = (torch.float16, torch.bfloat16) + ((torch.float32,) if allowed("float32") else ())
    if query.dtype not in takes:
        raise OperatorError(f"{operator}: query is {query.dtype}; it must be float16 or bfloat16")
    if query.dim() != 3 or query.shape[1] != heads:
        raise OperatorError(
            f"{operator}: query has shape {tuple(query.shape)}; it must be (tokens, {heads}, D)"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise OperatorError(
            f"{operator}: num_heads={heads} is no multiple of num_kv_heads={kv_heads}; it must be"
        )


def check_fresh(operator: str, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> None:
    """key, value [T, KV_N, D] of the query's dtype."""
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise OperatorError(f"{operator}: {name} is {x.dtype}; it must be {query.dtype}")
        if x.dim() != 3 or x.shape[:2] != (query.shape[0], kv_heads):
            raise OperatorError(
                f"{operator}: {name} has shape {tuple(x.shape)}; it must be "
                f"({query.shape[0]}, {kv_heads}, D)"
            )
    if key.shape[-1] != query.shape[-1]:
        raise OperatorError(
            f"{operator}: key has head size {key.shape[-1]} and query {query.shape[-1]}; "
            "they must be the same"
        )


def check_cache(
    operator: str, query: Tensor, key_cache: Tensor, value_cache: Tensor, kv_heads: int
) -> None:
    """Caches [blocks, block_size, KV_N, D] of the query's dtype; the values' D may be smaller."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dtype != query.dtype:
            raise OperatorError(f"{operator}: {name} is {cache.dtype}; it must be {query.dtype}")
        if cache.dim() != 4 or cache.shape[2] != kv_heads:
            raise OperatorError(
                f"{operator}: {name} has shape {tuple(cache.shape)}; it must be (blocks, "
                f"block_size, {kv_heads}, D)"
            )
    if key_cache.shape[:2] != value_cache.shape[:2]:
        raise OperatorError(
            f"{operator}: key_cache has shape {tuple(key_cache.shape)} and value_cache "
            f"{tuple(value_cache.shape)}; they must have the same blocks"
        )
    size, widest = key_cache.shape[1], max(key_cache.shape[-1], value_cache.shape[-1])
    if not size or size % 16:
        raise OperatorError(
            f"{operator}: key_cache has blocks of {size} tokens; it must be a multiple of 16"
        )
    if widest > _WIDEST_HEAD or (widest > _WIDE_HEAD and size > _MOST_WIDE):
        raise OperatorError(
            f"{operator}: the head size is {widest} in blocks of {size} tokens; it may be "
            f"{_WIDEST_HEAD} at most, and above {_WIDE_HEAD} in blocks of up to {_MOST_WIDE}"
        )
    if key_cache.shape[-1] != query.shape[-1]:
        raise OperatorError(
            f"{operator}: key_cache has head size {key_cache.shape[-1]} and query "
            f"{query.shape[-1]}; they must be the same"
        )


def lengths(operator: str, name: str, lens: Tensor) -> list[int]:
    """The numbers of an int32 tensor [B], none negative."""
    if lens.dtype != torch.int32 or lens.dim() != 1:
        raise OperatorError(
            f"{operator}: {name} is {lens.dtype} of shape {tuple(lens.shape)}; "
            "it must be int32 of one dimension"
        )
    found: list[int] = lens.tolist()
    if any(length < 0 for length in found):
        raise OperatorError(f"{operator}: {name} has {min(found)}; a length must not be negative")
    return found


def check_count(operator: str, name: str, found: int, wanted: int) -> None:
    """One entry a request."""
    if found != wanted:
        raise OperatorError(
            f"{operator}: {name} has {found} entries for {wanted} requests; it must have one each"
        )


def check_total(operator: str, name: str, total: int, tokens: int) -> None:
    """The lengths do not exceed the tokens that are there."""
    if total > tokens:
        raise OperatorError(
            f"{operator}: {name} adds up to {total}; query has only {tokens} tokens"
        )


def check_contexts(operator: str, lens: list[int], contexts: list[int]) -> None:
    """Each context holds the request's new tokens."""
    for index, (rows, context) in enumerate(zip(lens, contexts, strict=True)):
        if context < rows:
            raise OperatorError(
                f"{operator}: context_lens has {context} at place {index}, where seq_len has "
                f"{rows}; the context includes the new tokens"
            )


def check_table(operator: str, table: Tensor, lens: list[int], cache: Tensor) -> None:
    """block_table int32 [B, entries], valid as far as each request's length goes."""
    blocks, size = cache.shape[:2]
    if table.dtype != torch.int32 or table.dim() != 2:
        raise OperatorError(
            f"{operator}: block_table is {table.dtype} of shape {tuple(table.shape)}; "
            "it must be int32 of (requests, blocks per request)"
        )
    check_count(operator, "block_table", table.shape[0], len(lens))
    needed = [-(-length // size) for length in lens]
    most = max(needed, default=0)
    if table.shape[1] < most:
        raise OperatorError(
            f"{operator}: block_table has {table.shape[1]} entries a request; "
            f"the longest request needs {most}"
        )
    columns = torch.arange(table.shape[1])
    used = columns[None, :] < torch.tensor(needed, dtype=torch.int64)[:, None]
    wrong = used & ((table < 0) | (table >= blocks))
    if bool(wrong.any()):
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise OperatorError(
            f"{operator}: block_table has {int(table[row, column])} at ({row}, {column}); "
            f"the cache has blocks 0..{blocks - 1}"
        )


def check_square_mask(operator: str, mask: Tensor, query: Tensor, longest: int) -> None:
    """A mask [S, S] (or [1, S, S]) of the query's dtype that covers the longest sequence."""
    if mask.dtype != query.dtype:
        raise OperatorError(f"{operator}: mask is {mask.dtype}; it must be {query.dtype}")
    if mask.dim() != 2 or min(mask.shape) < longest:
        raise OperatorError(
            f"{operator}: mask has shape {tuple(mask.shape)}; the longest sequence needs "
            f"({longest}, {longest})"
        )


def check_causal_mask(operator: str, mask: Tensor, query: Tensor) -> None:
    """The compressed causal mask: [128, 128], 0 and, above the diagonal, anything else."""
    if mask.dtype != query.dtype:
        raise OperatorError(f"{operator}: mask is {mask.dtype}; it must be {query.dtype}")
    if tuple(mask.shape) != (_MASK_SIDE, _MASK_SIDE):
        raise OperatorError(
            f"{operator}: mask has shape {tuple(mask.shape)}; it must be the compressed one of "
            f"({_MASK_SIDE}, {_MASK_SIDE})"
        )
    upper = torch.triu(torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool), diagonal=1)
    if not torch.equal(mask != 0, upper):
        raise OperatorError(
            f"{operator}: mask is not the plain causal one; it must be 0 and, above the diagonal, "
            "hide"
        )


def room(operator: str, out: Tensor, query: Tensor, width: int) -> Tensor:
    """``out`` as [T, N, width], or OperatorError."""
    if out.dtype != query.dtype:
        raise OperatorError(f"{operator}: out is {out.dtype}; it must be {query.dtype}")
    if out.numel() != query.shape[0] * query.shape[1] * width:
        raise OperatorError(
            f"{operator}: out has shape {tuple(out.shape)}; it must be "
            f"({query.shape[0]}, {query.shape[1]}, {width})"
        )
    if not out.is_contiguous():
        raise OperatorError(f"{operator}: out is not contiguous; it must be")
    return out.view(query.shape[0], query.shape[1], width)

"""The documented limits of fused inference attention on a paged cache."""

from __future__ import annotations

import torch

from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem
from ascend_patch.kernels.npu_ops.settings import allowed

# What one row of a (blocks, block_size, H) cache may hold.
_WIDEST_ROW = 65535


def check(problem: Problem) -> None:
    """Raise OperatorError for the first limit that the call breaks."""
    if not problem.kv_lens:
        raise problem.error(f"{problem.kv_lens_name} is missing; a block table needs it")
    _check_table(problem)
    _check_cache(problem)
    _check_entries(problem)


def _check_table(problem: Problem) -> None:
    table = problem.block_table
    assert table is not None
    if table.dtype != torch.int32:
        raise problem.error(f"block_table is {table.dtype}; it must be int32")
    if table.dim() != 2:
        raise problem.error(
            f"block_table has shape {tuple(table.shape)}; it must be (batch, blocks per request)"
        )
    if table.shape[0] != problem.batch:
        raise problem.error(
            f"block_table has {table.shape[0]} rows for a batch of {problem.batch}; "
            "it must have one for each request"
        )


def check_block_size(problem: Problem) -> None:
    """Raise OperatorError unless the layout takes blocks of this size."""
    size = problem.block_size
    if problem.ragged:
        ok, wanted = 0 < size <= 1024 and size % 16 == 0, "a multiple of 16 up to 1024 in TND"
    elif problem.single:
        multiple = 32 if problem.key.dtype == torch.int8 else 16
        ok = 0 < size <= 512 and size % multiple == 0
        wanted = f"a multiple of {multiple} up to 512 with Q_S = 1 and {problem.key.dtype} keys"
    else:
        ok, wanted = size in (128, 256, 384, 512), "128, 256, 384 or 512 with Q_S > 1"
    if not ok:
        raise problem.error(f"block_size={size}; it must be {wanted}")


def _check_cache(problem: Problem) -> None:
    key, value, kv_heads = problem.key, problem.value, problem.kv_heads
    for name, cache in (("key", key), ("value", value)):
        by_head = cache.dim() == 4
        if cache.dim() != 3 and not (by_head and problem.letters in ("BNSD", "TND", "NTD")):
            also = "" if problem.letters in ("BSH", "BSND") else " or (blocks, KV_N, block_size, D)"
            raise problem.error(
                f"the cache {name} has shape {tuple(cache.shape)}; input_layout="
                f"{problem.layout!r} takes (blocks, block_size, KV_N * D){also}"
            )
        size = cache.shape[2] if by_head else cache.shape[1]
        if size != problem.block_size:
            raise problem.error(
                f"the cache {name} has blocks of {size} tokens; block_size says "
                f"{problem.block_size}"
            )
        if by_head and cache.shape[1] != kv_heads:
            raise problem.error(
                f"the cache {name} has {cache.shape[1]} heads; num_key_value_heads says {kv_heads}"
            )
        if not by_head and cache.shape[2] % kv_heads:
            raise problem.error(
                f"the cache {name} has H={cache.shape[2]}, no multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if not by_head and cache.shape[2] > _WIDEST_ROW:
            raise problem.error(
                f"the cache {name} has KV_N * D = {cache.shape[2]}; in (blocks, block_size, H) it "
                f"may be {_WIDEST_ROW} at most; use (blocks, KV_N, block_size, D)"
            )
    # A ragged value may be narrower than its key.
    same = key.dim() == value.dim() and key.shape[:-1] == value.shape[:-1]
    if not same or (not problem.ragged and key.shape != value.shape):
        raise problem.error(
            f"the cache value has shape {tuple(value.shape)} and key {tuple(key.shape)}; "
            "they must be the same"
        )
    if problem.key_width != problem.query_width:
        raise problem.error(
            f"the cache key has head size {problem.key_width} and query {problem.query_width}; "
            "they must be the same"
        )
    if problem.newer and problem.ragged and problem.heads == kv_heads and problem.heads_first:
        raise problem.error(
            "a (blocks, KV_N, block_size, D) cache in TND with as many key/value heads as query "
            "heads; use (blocks, block_size, H)"
        )


def _check_entries(problem: Problem) -> None:
    table, lens, size = problem.block_table, problem.kv_lens, problem.block_size
    assert table is not None
    assert lens is not None
    needed = [-(-(lens[0] if len(lens) == 1 else lens[i]) // size) for i in range(problem.batch)]
    most = max(needed, default=0)
    if table.shape[1] < most:
        raise problem.error(
            f"block_table has {table.shape[1]} entries a request; the longest request needs {most}"
        )
    blocks = problem.key.shape[0]
    if sum(needed) > blocks and not allowed("shared_blocks"):
        raise problem.error(
            f"the cache has {blocks} blocks; the requests need {sum(needed)} together"
        )
    # Entries beyond a request's length may hold anything.
    columns = torch.arange(table.shape[1])
    used = columns[None, :] < torch.tensor(needed, dtype=torch.int64)[:, None]
    wrong = used & ((table < 0) | (table >= blocks))
    if bool(wrong.any()):
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise problem.error(
            f"block_table has {int(table[row, column])} at ({row}, {column}); "
            f"the cache has blocks 0..{blocks - 1}"
        )

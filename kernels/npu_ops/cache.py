"""The operators that write and read a paged KV cache: what they do to memory.

A slot is ``block * block_size + offset``. A cache is ND, [blocks, block_size, heads, head_size],
or, where an operator says so, NZ as it lies in memory: [blocks, heads * head_size / w, block_size,
w] with w elements of 32 bytes. Values are moved, never computed with.

Sources: op-plugin's documentation and adapters, and the sources of ATB
(ascend-transformer-boost), whose kernels ``_npu_reshape_and_cache`` and ``npu_paged_cache_load``
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import cache_checks as checks
from ascend_patch.kernels.npu_ops import cache_load_checks as load_checks


def _write(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """cache [blocks, block_size, H, D], of any strides; rows [T, H, D]; slots [T], 0 or more."""
    block_size = cache.shape[1]
    cache[slots // block_size, slots % block_size] = rows.to(cache.dtype)


def _write_nz(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """cache [blocks, H * D / w, block_size, w]; rows [T, H, D]; slots [T], 0 or more."""
    _, groups, block_size, width = cache.shape
    cache[slots // block_size, :, slots % block_size] = rows.reshape(-1, groups, width)


def _npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """key, value [T, H, D] into ND caches at int32 slots [T]; a negative slot is skipped.

    Raises OperatorError for what the operator refuses, and for slots beyond the cache.
    """
    checks.reshape_and_cache(key, value, key_cache, value_cache, slot_indices)
    kept = slot_indices >= 0
    slots = slot_indices[kept].long()
    _write(key_cache, key[kept], slots)
    _write(value_cache, value[kept], slots)


def _npu_reshape_and_cache_siso(key: Tensor, key_cache: Tensor, slot_indices: Tensor) -> None:
    """``_npu_reshape_and_cache`` of one tensor and one cache."""
    checks.reshape_and_cache_siso(key, key_cache, slot_indices)
    kept = slot_indices >= 0
    _write(key_cache, key[kept], slot_indices[kept].long())


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """key, value [T, H, D] into caches at slots [T], in place.

    ``cache_mode``: "Norm" or None for ND caches, "PA_NZ" for NZ ones; before torch_npu 2.10 the
    operator has no such argument and NZ caches are what it takes. Raises OperatorError for what the
    documentation rules out; keys of four dimensions, its compressed caches, are not emulated.
    """
    checks.scatter_pa_kv_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        cache_mode,
        (compress_lens, compress_seq_offsets, seq_lens),
    )
    write = _write_nz if cache_mode == "PA_NZ" else _write
    slots = slot_mapping.long()
    write(key_cache, key, slots)
    write(value_cache, value, slots)


def npu_scatter_pa_kv_cache_functional(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *more: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """``npu_scatter_pa_kv_cache`` into contiguous copies of the caches, which it returns."""
    caches = key_cache.contiguous().clone(), value_cache.contiguous().clone()
    npu_scatter_pa_kv_cache(key, value, *caches, *more, **options)
    return caches


def npu_gather_pa_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seq_offset: Tensor | None = None,
    is_seq_lens_cumsum: bool = False,
) -> None:
    """Sequences out of ND caches into key and value [T, H, D], one after another, in place.

    ``seq_lens``: int32 [B], or [B + 1] cumulative; ``seq_offset``: int32 [B], the token from whose
    block on each sequence is read (its place within that block is not looked at). A block that the
    table or the cache does not have reads as zeros.
    Raises OperatorError for what the documentation rules out.
    """
    lengths = load_checks.gather_pa_kv_cache(
        key_cache, value_cache, block_tables, seq_lens, key, value, seq_offset, is_seq_lens_cumsum
    )
    for cache, out in ((key_cache, key), (value_cache, value)):
        blocks, block_size = cache.shape[:2]
        end = 0
        for request, length in enumerate(lengths):
            start, end = end, end + length
            first = 0 if seq_offset is None else int(seq_offset[request]) // block_size
            places = torch.arange(end - start)
            columns = first + places // block_size
            inside = columns < block_tables.shape[1]
            ids = block_tables[request, columns.clamp(max=block_tables.shape[1] - 1)].long()
            there = inside & (ids >= 0) & (ids < blocks)
            rows = cache[ids.clamp(0, blocks - 1), places % block_size]
            out[start:end] = rows.masked_fill(~there[:, None, None], 0)


def npu_gather_pa_kv_cache_functional(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``npu_gather_pa_kv_cache`` into copies of key and value, which it returns."""
    out = key.clone(), value.clone()
    npu_gather_pa_kv_cache(key_cache, value_cache, block_tables, seq_lens, *out, **options)
    return out


def npu_paged_cache_load_out(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Contexts out of ND caches into key and value [T, H, D], one after another.

    ``context_lens``: int32 [B], or [B + 1] cumulative with ``cumsum``; ``seq_starts``: int32 [B],
    the token from whose block on each context is read, counted in whole blocks.
    Raises OperatorError for what the operator refuses, and where it would read or write memory that
    is not the cache's, the table's or the outputs'.
    """
    spans = load_checks.paged_cache_load(
        key_cache, value_cache, block_table, context_lens, seq_starts, cumsum, key, value
    )
    block_size = key_cache.shape[1]
    for request, (start, end, first) in enumerate(spans):
        places = torch.arange(end - start)
        ids = block_table[request, first + places // block_size].long()
        key[start:end] = key_cache[ids, places % block_size]
        value[start:end] = value_cache[ids, places % block_size]
    return key, value


def npu_paged_cache_load(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
) -> tuple[Tensor, Tensor]:
    """``npu_paged_cache_load.out`` into new tensors. It reads the lengths: a sync on an NPU."""
    tokens = load_checks.context_tokens(context_lens, cumsum)
    key, value = (cache.new_empty((tokens, *cache.shape[2:])) for cache in (key_cache, value_cache))
    return npu_paged_cache_load_out(
        key_cache,
        value_cache,
        block_table,
        context_lens,
        seq_starts=seq_starts,
        cumsum=cumsum,
        key=key,
        value=value,
    )


KERNELS: dict[str, Callable[..., Any]] = {
    "atb::_npu_reshape_and_cache": _npu_reshape_and_cache,
    "atb::_npu_reshape_and_cache_siso": _npu_reshape_and_cache_siso,
    "npu::npu_scatter_pa_kv_cache": npu_scatter_pa_kv_cache,
    "npu::npu_gather_pa_kv_cache": npu_gather_pa_kv_cache,
    "atb::npu_paged_cache_load": npu_paged_cache_load,
    "atb::npu_paged_cache_load.out": npu_paged_cache_load_out,
}

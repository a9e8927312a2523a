"""What ATB's sources and torch_npu's documentation rule out where a paged KV cache is written.

``cache_load_checks`` has what reads one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import OperatorError, require
from ascend_patch.kernels.npu_ops.settings import allowed, torch_npu_at_least

_MOVED = (torch.float16, torch.bfloat16, torch.int8)
ALIGNED = 32  # bytes
NORM_SINCE = "2.10.0"


def movable(operator: str, name: str, x: Tensor) -> None:
    dtypes = [*_MOVED] + [torch.float32] * allowed("float32")
    require(x.dtype in dtypes, operator, f"{name} is {x.dtype}, not one of {dtypes}")


def same_dtype(operator: str, **tensors: Tensor) -> None:
    found = {name: x.dtype for name, x in tensors.items()}
    if len(set(found.values())) != 1:
        said = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise OperatorError(f"{operator}: {said}; all must have the same dtype")


def _dims(operator: str, name: str, x: Tensor, dims: int, shape: str) -> None:
    if x.dim() != dims:
        raise OperatorError(f"{operator}: {name} {list(x.shape)} must be {shape}")


def _not_empty(operator: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        require(x.numel() > 0, operator, f"{name} {list(x.shape)} is empty, which is not supported")


def _slots(operator: str, name: str, slots: Tensor, tokens: int, cache: Tensor) -> None:
    if slots.dtype != torch.int32:
        raise OperatorError(f"{operator}: {name} is {slots.dtype}, not int32")
    if tuple(slots.shape) != (tokens,):
        raise OperatorError(f"{operator}: {name} {list(slots.shape)} must be [{tokens}], as key is")
    there = cache.shape[0] * cache.shape[1]
    if tokens and int(slots.max()) >= there:
        raise OperatorError(
            f"{operator}: {name} has {int(slots.max())} and the cache {there} slots "
            f"({cache.shape[0]} blocks of {cache.shape[1]}); the write would be outside of it"
        )


def into(operator: str, name: str, x: Tensor, cache: Tensor) -> None:
    _dims(operator, name, x, 3, "[tokens, heads, head_size]")
    _dims(operator, f"{name}_cache", cache, 4, "[blocks, block_size, heads, head_size]")
    if x.shape[1:] != cache.shape[2:]:
        raise OperatorError(
            f"{operator}: {name} {list(x.shape)} and {name}_cache {list(cache.shape)} must have "
            "the same heads and head_size"
        )


def caches(operator: str, key_cache: Tensor, value_cache: Tensor, dims: int) -> None:
    if key_cache.shape[:dims] != value_cache.shape[:dims]:
        raise OperatorError(
            f"{operator}: key_cache {list(key_cache.shape)} and value_cache "
            f"{list(value_cache.shape)} must have the same first {dims} dimensions"
        )


def _as_counted(operator: str, **written: Tensor) -> None:
    """ATB's kernels find slot s at s * heads * head_size, whatever a cache's strides are."""
    if allowed("strided_cache"):
        return
    for name, cache in written.items():
        if not cache.is_contiguous():
            raise OperatorError(
                f"{operator}: {name} {list(cache.shape)} has strides {list(cache.stride())}; the "
                "kernel writes as if it were contiguous, to other places"
            )


def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """ATB: one dtype (float16, bfloat16, int8), nothing empty, int32 slots, one for each token."""
    operator = "_npu_reshape_and_cache"
    into(operator, "key", key, key_cache)
    into(operator, "value", value, value_cache)
    movable(operator, "key", key)
    same_dtype(operator, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    if key.shape[:2] != value.shape[:2]:
        raise OperatorError(
            f"{operator}: key {list(key.shape)} and value {list(value.shape)} must have the same "
            "tokens and heads"
        )
    caches(operator, key_cache, value_cache, 3)
    _as_counted(operator, key_cache=key_cache, value_cache=value_cache)
    _not_empty(operator, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    _slots(operator, "slot_indices", slots, key.shape[0], key_cache)


def reshape_and_cache_siso(key: Tensor, key_cache: Tensor, slots: Tensor) -> None:
    """As ``reshape_and_cache``, of one tensor."""
    operator = "_npu_reshape_and_cache_siso"
    into(operator, "key", key, key_cache)
    movable(operator, "key", key)
    same_dtype(operator, key=key, key_cache=key_cache)
    _as_counted(operator, key_cache=key_cache)
    _not_empty(operator, key=key, key_cache=key_cache)
    _slots(operator, "slot_indices", slots, key.shape[0], key_cache)


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    cache_mode: str | None,
    compression: tuple[Tensor | None, ...],
) -> None:
    """One dtype, contiguous, slots unique and within the cache, the layout of the mode."""
    operator = "npu_scatter_pa_kv_cache"
    if cache_mode not in (None, "Norm", "PA_NZ"):
        raise OperatorError(f"{operator}: cache_mode must be Norm or PA_NZ, not {cache_mode!r}")
    if cache_mode != "PA_NZ" and not torch_npu_at_least(NORM_SINCE):
        raise OperatorError(
            f"{operator}: cache_mode exists since torch_npu {NORM_SINCE}; before, caches are NZ"
        )
    if key.dim() == 4 or any(x is not None for x in compression):
        raise OperatorError(
            f"{operator}: compressed caches (key of 4 dimensions, compress_lens, seq_lens) are "
            "not emulated"
        )
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    for name, x in tensors.items():
        dims, shape = (4, "4-D") if name.endswith("cache") else (3, "[tokens, heads, head_size]")
        _dims(operator, name, x, dims, shape)
    movable(operator, "key", key)
    same_dtype(operator, **tensors)
    for name, x in {**tensors, "slot_mapping": slots}.items():
        require(x.is_contiguous(), operator, f"{name} must be contiguous")
    if key.shape[:2] != value.shape[:2]:
        raise OperatorError(
            f"{operator}: key {list(key.shape)} and value {list(value.shape)} must have the same "
            "tokens and heads"
        )
    if cache_mode == "PA_NZ":
        _nz(operator, "key", key, key_cache)
        _nz(operator, "value", value, value_cache)
        places = key_cache.shape[0] * key_cache.shape[2]
        same = key_cache.shape[::2] == value_cache.shape[::2] or key_cache.shape[0] == 0
    else:
        into(operator, "key", key, key_cache)
        into(operator, "value", value, value_cache)
        places = key_cache.shape[0] * key_cache.shape[1]
        same = key_cache.shape[:2] == value_cache.shape[:2]
    require(same, operator, "key_cache and value_cache must have the same blocks and block_size")
    _unique(operator, slots, key.shape[0], places)


def _nz(operator: str, name: str, x: Tensor, cache: Tensor) -> None:
    width = ALIGNED // x.element_size()
    groups, rest = divmod(x.shape[1] * x.shape[2], width)
    if rest or cache.shape[1] != groups or cache.shape[3] != width:
        raise OperatorError(
            f"{operator}: {name}_cache {list(cache.shape)} for {name} {list(x.shape)} must be NZ, "
            f"[blocks, heads * head_size / {width}, block_size, {width}]; for ND caches say "
            f'cache_mode="Norm" (torch_npu {NORM_SINCE})'
        )


def _unique(operator: str, slots: Tensor, tokens: int, places: int) -> None:
    if slots.dtype not in (torch.int32, torch.int64):
        raise OperatorError(f"{operator}: slot_mapping is {slots.dtype}, not int32 or int64")
    if tuple(slots.shape) != (tokens,):
        raise OperatorError(f"{operator}: slot_mapping {list(slots.shape)} must be [{tokens}]")
    if not tokens:
        return
    least, most = int(slots.min()), int(slots.max())
    if least < 0 or most >= places:
        raise OperatorError(
            f"{operator}: slot_mapping goes from {least} to {most}; the cache has slots 0 to "
            f"{places - 1}, and negative ones are not skipped"
        )
    if slots.unique().numel() != tokens:
        raise OperatorError(f"{operator}: slot_mapping names a slot twice; they must be unique")

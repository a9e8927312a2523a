"""What rotary_embedding accepts. Sentences for what it does not.

``check_call`` looks at shapes, dtypes and devices only; the operators call it in their eager and in
their fake implementation, so an error reads the same in both and Dynamo never traces it.
``check_positions`` reads device memory and belongs to the checked mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch import _env
from ascend_patch.kernels import arguments

CHECK_VARIABLE = _env.CHECK

_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CACHE_DTYPES = (*_QUERY_DTYPES, torch.float64)
_POSITION_DTYPES = (torch.int32, torch.int64)


def check_call(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    cos_sin_cache: Tensor,
    head_size: int,
    mrope_section: Sequence[int] | None,
) -> None:
    """Raise TypeError for a wrong dtype and ValueError for all else that is not taken."""
    arguments.check_tensors(
        "rotary_embedding",
        {"query": query, "positions": positions, "cos_sin_cache": cos_sin_cache},
        {"key": key},
    )
    if head_size < 1:
        raise ValueError(f"head_size must be at least 1, not {head_size}.")
    if positions.dtype not in _POSITION_DTYPES:
        raise TypeError(f"positions must be int32 or int64, not {positions.dtype}.")
    if query.dtype not in _QUERY_DTYPES:
        raise TypeError(f"query must be bfloat16, float16 or float32, not {query.dtype}.")
    _check_cache(cos_sin_cache, head_size)
    if mrope_section is not None:
        _check_mrope(positions, mrope_section, cos_sin_cache.shape[1])
    # Rank decides: with sections, two dimensions are [3, T]; without, all of them are tokens.
    tokens = positions.numel() if mrope_section is None else positions.shape[-1]
    _check_heads("query", query, tokens, head_size)
    if key is not None:
        if key.dtype != query.dtype:
            raise TypeError(
                f"key must have the dtype of query, {query.dtype}, but it is {key.dtype}."
            )
        _check_heads("key", key, tokens, head_size)


def check_in_place(query: Tensor, key: Tensor | None, cos_sin_cache: Tensor) -> None:
    """Raise ValueError where what is rotated in place shares memory with something else."""
    arguments.check_written("query", query)
    read = {"cos_sin_cache": cos_sin_cache}
    arguments.check_apart("query", query, {"key": key, **read})
    if key is not None:
        arguments.check_written("key", key)
        arguments.check_apart("key", key, read)


def _check_cache(cos_sin_cache: Tensor, head_size: int) -> None:
    if cos_sin_cache.dtype not in _CACHE_DTYPES:
        raise TypeError(f"cos_sin_cache must be floating point, not {cos_sin_cache.dtype}.")
    if cos_sin_cache.dim() != 2:
        raise ValueError(
            "cos_sin_cache must be [max_position, rotary_dim], "
            f"but it has {cos_sin_cache.dim()} dimensions: {_shape(cos_sin_cache)}."
        )
    rows, rotary_dim = cos_sin_cache.shape
    if rows == 0:
        raise ValueError("cos_sin_cache has no rows; it needs one for each position in use.")
    if rotary_dim == 0 or rotary_dim % 2:
        raise ValueError(
            f"rotary_dim, the width of cos_sin_cache, is {rotary_dim}; it must be even and "
            "positive, because a cosine half and a sine half of equal width share it."
        )
    if rotary_dim > head_size:
        raise ValueError(
            f"rotary_dim, the width of cos_sin_cache, is {rotary_dim}, more than head_size "
            f"{head_size}; a head can rotate at most all of its elements."
        )


def _check_mrope(positions: Tensor, mrope_section: Sequence[int], rotary_dim: int) -> None:
    if len(mrope_section) != 3 or min(mrope_section) < 0:
        raise ValueError(
            "mrope_section must be three sizes [time, height, width], none negative, "
            f"but it is {list(mrope_section)}."
        )
    if sum(mrope_section) != rotary_dim // 2:
        raise ValueError(
            f"mrope_section {list(mrope_section)} sums to {sum(mrope_section)}, but it must cover "
            f"rotary_dim / 2 = {rotary_dim // 2} frequencies."
        )
    if positions.dim() not in (1, 2) or (positions.dim() == 2 and positions.shape[0] != 3):
        raise ValueError(
            "with mrope_section, positions must be [3, T], or [T] for text only, "
            f"but they are {_shape(positions)}."
        )


def _check_heads(name: str, x: Tensor, tokens: int, head_size: int) -> None:
    if x.dim() == 2:
        if x.shape[1] % head_size:
            raise ValueError(
                f"{name} is {x.shape[1]} wide, which is no multiple of head_size {head_size}; "
                f"pass [T, heads * head_size] or [T, heads, head_size]."
            )
    elif x.dim() != 3 or x.shape[2] != head_size:
        raise ValueError(
            f"{name} must be [T, heads * {head_size}] or [T, heads, {head_size}], "
            f"but it is {_shape(x)}."
        )
    found = x.shape[0]
    if isinstance(found, int) and isinstance(tokens, int):
        if found != tokens:
            raise ValueError(_token_mismatch(name, found, tokens))
    else:
        # Symbolic sizes: an `if` would need their values, which unbacked ones do not have.
        torch._check(found == tokens, lambda: _token_mismatch(name, found, tokens))


def _token_mismatch(name: str, found: int, tokens: int) -> str:
    return f"{name} has {found} tokens, but positions are for {tokens}; the two must agree."


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """What apply_rotary accepts: TypeError for a wrong dtype, ValueError for a wrong shape."""
    arguments.check_tensors("apply_rotary", {"x": x, "cos": cos, "sin": sin})
    if x.dtype not in _QUERY_DTYPES:
        raise TypeError(f"x must be bfloat16, float16 or float32, not {x.dtype}.")
    if cos.dtype not in _CACHE_DTYPES or sin.dtype not in _CACHE_DTYPES:
        raise TypeError(f"cos and sin must be floating point, not {cos.dtype} and {sin.dtype}.")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [b, s, h, d] or [s, h, d], but it is {_shape(x)}.")
    if cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must have one shape, but they are {_shape(cos)} and {_shape(sin)}."
        )
    leading = x.shape[:-2]
    if cos.dim() < 2 or cos.shape[:-1] not in (leading, leading[-1:]):
        raise ValueError(
            f"for x {_shape(x)}, cos and sin must be [s, rotary_dim/2] or [b, s, rotary_dim/2], "
            f"but they are {_shape(cos)}."
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin hold {cos.shape[-1]} frequencies, which rotate {2 * cos.shape[-1]} "
            f"elements of a head, but a head of x has {x.shape[-1]}."
        )


def checked(argument: bool | None) -> bool:
    """Is the checked mode on? The argument decides; None leaves it to ASCEND_PATCHES_CHECK.

    Raises:
        SettingError: The variable is neither on nor off.
    """
    return _env.switch(CHECK_VARIABLE) if argument is None else argument


def check_positions(positions: Tensor, cos_sin_cache: Tensor) -> None:
    """Raise ValueError if a position has no row in the cache.

    Waits for the device, so it does nothing for tensors without memory to read (meta and fake
    ones) and while a device graph is being captured.
    """
    if type(positions) is not Tensor or positions.is_meta or positions.numel() == 0:
        return
    accelerator = getattr(torch, positions.device.type, None)
    capturing = getattr(accelerator, "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(positions))
    rows = cos_sin_cache.shape[0]
    if lowest < 0 or highest >= rows:
        raise ValueError(
            f"positions run from {lowest} to {highest}, but cos_sin_cache has rows for 0 to "
            f"{rows - 1}; build the cache for a longer context, or correct the positions."
        )

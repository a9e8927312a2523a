"""What torch_npu's documentation, and ATB behind _npu_rotary_embedding, rule out on Atlas A2, A3.

``rotary_mul_checks`` has the limits of npu_rotary_mul.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import surface
from ascend_patch.kernels.npu_ops.errors import OperatorError, require
from ascend_patch.kernels.npu_ops.settings import allowed, torch_npu_at_least

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The unified buffer of a vector core, in bytes.
_BUFFER = 192 * 1024

# Sections of npu_mrope; those that came with cache_mode are in the second.
_MODES_SINCE = "2.10.0"
_SECTIONS = ((16, 24, 24),)
_LATER_SECTIONS = ((24, 20, 20), (8, 12, 12), (16, 16, 16, 16))


def floats(operator: str, **tensors: Tensor) -> None:
    """Refuse other dtypes than float16, bfloat16 and float32."""
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            raise OperatorError(f"{operator}: {name} is {x.dtype}, not one of {list(FLOATS)}")


def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str, mode: str
) -> None:
    """One dtype; BSND or TND; mode half; D 64 or 128; cos and sin [B, S, 1, D] or [T, 1, D]."""
    operator = "npu_apply_rotary_pos_emb"
    require(mode == "half", operator, f"rotary_mode is {mode!r}; Atlas A2 and A3 have half only")
    # Before torch_npu 2.11 the default is spelt BSH, and means the same.
    if layout not in ("BSND", "BSH", "TND"):
        raise OperatorError(f"{operator}: layout is {layout!r}; Atlas A2 and A3 have BSND and TND")
    floats(operator, query=query)
    dims = 3 if layout == "TND" else 4
    for name, x in {"query": query, "key": key, "cos": cos, "sin": sin}.items():
        if x.dtype != query.dtype:
            raise OperatorError(
                f"{operator}: {name} is {x.dtype} and query {query.dtype}; all must be the same"
            )
        if x.dim() != dims:
            raise OperatorError(
                f"{operator}: {name} has {x.dim()} dimensions; layout {layout} has {dims}"
            )
        require(x.numel() > 0, operator, f"{name} {list(x.shape)} is empty, which is not supported")
        if x.shape[: dims - 2] != query.shape[: dims - 2]:
            raise OperatorError(
                f"{operator}: {name} {list(x.shape)} and query {list(query.shape)} must have the "
                f"same first {dims - 2} dimensions"
            )
        if x.shape[-1] != query.shape[-1] or x.shape[-1] not in (64, 128):
            raise OperatorError(
                f"{operator}: the last dimension of {name} is {x.shape[-1]} and of query "
                f"{query.shape[-1]}; all must be 64, or all 128"
            )
    for name, x in {"cos": cos, "sin": sin}.items():
        if x.shape[-2] != 1:
            raise OperatorError(
                f"{operator}: {name} {list(x.shape)} must have 1 in the place of the heads"
            )
    _fits(query, key)


def _fits(query: Tensor, key: Tensor) -> None:
    """All heads of a token at once, as aclnnApplyRotaryPosEmbV2 documents what it needs."""
    size, heads, width = query.element_size(), query.shape[-2] + key.shape[-2], query.shape[-1]
    cast = query.dtype == torch.bfloat16
    worked = 4 if cast else size
    needed = 5 * heads * width * worked + 4 * width * size + cast * 8 * width
    if needed > _BUFFER:
        raise OperatorError(
            f"npu_apply_rotary_pos_emb: {heads} heads of query and key, {width} wide, need "
            f"{needed} bytes of a vector core's buffer, which has {_BUFFER}"
        )


def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cache: Tensor,
    head_size: int,
    mrope_section: Sequence[int] | None,
    rotary_mode: str | None,
    cache_mode: str | None,
) -> tuple[int, ...]:
    """Check a call of npu_mrope; the sections, empty where it is plain RoPE."""
    operator = "npu_mrope"
    floats(operator, query=query)
    for name, x in {"query": query, "key": key, "cos_sin_cache": cache}.items():
        if x.dim() != 2 or x.dtype != query.dtype:
            raise OperatorError(
                f"{operator}: {name} is {list(x.shape)} of {x.dtype}; it must have 2 dimensions "
                f"and query's dtype, {query.dtype}"
            )
    multiple = 16 if query.dtype == torch.float32 else 32
    width = cache.shape[1]
    for name, size in {"head_size": head_size, "rotary_dim": width}.items():
        if size % multiple or size <= 0:
            raise OperatorError(
                f"{operator}: {name} is {size}; for {query.dtype} it must be a multiple of "
                f"{multiple}"
            )
    require(
        width <= head_size, operator, f"rotary_dim {width} must not be above head_size {head_size}"
    )
    tokens = positions.shape[-1] if positions.dim() else 0
    require(tokens > 0, operator, f"positions {list(positions.shape)} must not be empty")
    for name, x in {"query": query, "key": key}.items():
        if x.shape[1] % head_size or x.shape[0] != tokens:
            raise OperatorError(
                f"{operator}: {name} {list(x.shape)} must be [{tokens}, heads * {head_size}] for "
                f"positions {list(positions.shape)}"
            )
    # The documentation calls GPT-J style "interleaved", torch_npu's own tests "interleave".
    if rotary_mode not in (None, "half", "interleave", "interleaved"):
        raise OperatorError(
            f"{operator}: rotary_mode must be half or interleaved, not {rotary_mode!r}"
        )
    sections = _sections(positions, width, mrope_section, cache_mode)
    if positions.dtype == torch.int32 and not torch_npu_at_least(_MODES_SINCE):
        raise OperatorError(
            f"{operator}: positions are torch.int32, which it takes since torch_npu {_MODES_SINCE}"
        )
    _positions(operator, positions, cache.shape[0])
    return sections


def _sections(
    positions: Tensor, width: int, mrope_section: Sequence[int] | None, cache_mode: str | None
) -> tuple[int, ...]:
    operator, since = "npu_mrope", _MODES_SINCE
    sections = tuple(mrope_section or ())
    if cache_mode not in (None, "default", "interleave"):
        raise OperatorError(
            f"{operator}: cache_mode must be default or interleave, not {cache_mode!r}"
        )
    plain = not any(sections)
    if positions.dim() != (1 if plain else 2):
        raise OperatorError(
            f"{operator}: positions {list(positions.shape)} for mrope_section "
            f"{list(sections)}; plain RoPE ([0, 0, 0]) takes [tokens], sections [rows, tokens]"
        )
    if plain:
        # Its own tests give "interleave" here too, where there is nothing to put in turns.
        return ()
    known = _SECTIONS + (_LATER_SECTIONS if torch_npu_at_least(since) else ())
    if sections not in known:
        raise OperatorError(
            f"{operator}: mrope_section {list(sections)} is none of {[list(s) for s in known]} "
            "or [0, 0, 0]"
        )
    if len(sections) != positions.shape[0]:
        raise OperatorError(
            f"{operator}: positions {list(positions.shape)} must have a row for each of the "
            f"{len(sections)} sections"
        )
    if sum(sections) != width // 2:
        raise OperatorError(
            f"{operator}: mrope_section {list(sections)} adds up to {sum(sections)}; it must be "
            f"half of rotary_dim, {width // 2}"
        )
    if cache_mode == "interleave" and (len(sections) == 4 or not torch_npu_at_least(since)):
        raise OperatorError(
            f"{operator}: cache_mode interleave takes three sections, since torch_npu {since}"
        )
    return sections


def _positions(operator: str, positions: Tensor, rows: int) -> None:
    if positions.dtype not in (torch.int32, torch.int64):
        raise OperatorError(f"{operator}: positions are {positions.dtype}, not int32 or int64")
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < rows:
        raise OperatorError(
            f"{operator}: positions from {int(positions.min())} to {int(positions.max())} for a "
            f"cache of {rows} rows; rows are looked up unchecked, outside of it there is other "
            "memory"
        )


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cache: Tensor,
    is_neox_style: bool,
) -> None:
    """ATB's Rope: dtypes, 2-D query and key, a cache 16 to 4096 wide that divides them both."""
    operator = "_npu_rotary_embedding"
    dtypes = [torch.float16, torch.bfloat16] + [torch.float32] * allowed("float32")
    require(query.dtype in dtypes, operator, f"query is {query.dtype}, not one of {dtypes}")
    fine = cache.dtype == query.dtype
    # ATB's high precision: float16 heads with float32 angles.
    fine |= (query.dtype, cache.dtype) == (torch.float16, torch.float32)
    if key.dtype != query.dtype or not fine:
        raise OperatorError(
            f"{operator}: query is {query.dtype}, key {key.dtype} and cos_sin_cache {cache.dtype}; "
            "they must be the same (or a float32 cache for float16)"
        )
    tokens, width = positions.numel(), cache.shape[-1]
    for name, x in {"query": query, "key": key}.items():
        if x.dim() != 2 or x.shape[0] != tokens or not x.numel():
            raise OperatorError(
                f"{operator}: {name} {list(x.shape)} must be [{tokens}, hidden], not empty, for "
                f"{tokens} positions"
            )
    if cache.dim() != 2 or not 16 <= width <= 4096 or width % 2:
        raise OperatorError(
            f"{operator}: cos_sin_cache {list(cache.shape)} must be [rows, 16 to 4096, even]"
        )
    if query.shape[1] % key.shape[1] or key.shape[1] % width:
        raise OperatorError(
            f"{operator}: query is {query.shape[1]} wide, key {key.shape[1]} and cos_sin_cache "
            f"{width}; each must be a multiple of the next"
        )
    if not is_neox_style and head_size not in (2, 4, width):
        raise OperatorError(
            f"{operator}: head_size is {head_size} and cos_sin_cache {width} wide; in GPT-J style "
            "they must be the same"
        )
    _positions(operator, positions, cache.shape[0])
    _first(operator, cache)


# The surface that stands for a process, and the first cache that it saw.
_kept: list[tuple[surface.Surface | None, Tensor]] = []


def forget() -> None:
    """As a new process: which cache _npu_rotary_embedding saw first."""
    _kept.clear()


def _first(operator: str, cache: Tensor) -> None:
    """torch_npu's adapter makes cosines and sines of the first cache and never of another."""
    if allowed("other_cos_sin_cache"):
        return
    process = surface.installed()
    if not _kept or _kept[0][0] is not process:
        _kept[:] = [(process, cache.clone())]
    first = _kept[0][1]
    if first.shape != cache.shape or not torch.equal(first.float(), cache.float()):
        raise OperatorError(
            f"{operator}: cos_sin_cache {list(cache.shape)} is another than the first of this "
            f"process, {list(first.shape)}; the operator keeps turning by the first one's angles"
        )

"""merge_head_shards_: what it takes, and who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.kv_layout import merge_reference
from ascend_patch.kernels.kv_layout.checks import whole_numbers
from ascend_patch.kernels.kv_layout.topology import HND, LAYOUTS

OPERATOR = "merge_head_shards_"


@dataclass(frozen=True)
class MergeCall:
    """A checked call.

    Attributes:
        caches: [num_blocks, block_size, H, W] each, all parts of all layers; a block is contiguous,
            what lies between two is any number of bytes. H and block_size are alike.
        sources: Where the shards are, one for each cache: the cache itself, or
            [len(block_ids), block_size, H, W] whose i-th block holds those of ``block_ids[i]``.
        block_ids: Without duplicates, at least one.
        shards: Heads of each shard, at least two of them; their sum is H.
    """

    caches: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    block_ids: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def in_place(self) -> bool:
        """Do the shards lie where the result goes?"""
        return self.sources[0] is self.caches[0]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return int(self.caches[0].shape[1])

    @property
    def heads(self) -> int:
        """KV heads of a block."""
        return int(self.caches[0].shape[2])

    @cached_property
    def source_ids(self) -> tuple[int, ...]:
        """The number of each block in its source."""
        return self.block_ids if self.in_place else tuple(range(len(self.block_ids)))


def merge_head_shards_(
    caches: Sequence[Tensor],
    block_ids: Sequence[int] | Tensor,
    shards: Sequence[int] | int,
    *,
    layout: str = "NHD",
    parts_dim: int | None = None,
    staging: Sequence[Tensor] | None = None,
) -> None:
    """Make one NHD block of the head shards that were pulled into it, in place, layers at once.

    In a block, shard s of h_s heads lies at byte ``block_size * sum(h[:s]) * W * itemsize`` as
    [block_size, h_s, W] ("pull-major"); afterwards the block is [block_size, H, W] with the shards'
    heads in order. Bytes are moved, never computed with: any dtype, NaN payloads included. Blocks
    that are not named, and what lies between blocks, are left alone. With a layout of HND a shard
    is where it belongs from the beginning, and nothing is done.

    Args:
        caches: One tensor for each part of each layer, [num_blocks, block_size, H, W], any dtype,
            a block contiguous. W and dtype may differ from part to part.
        block_ids: Blocks of the request, on the host (a device tensor is read). No duplicates.
        shards: Heads of each shard in their order in the block, or the number of equal shards.
            One shard needs nothing done.
        layout: Of the caches, `NHD` or `HND` ([num_blocks, H, block_size, W]).
        parts_dim: The dimension of K and V where a cache holds both: 0 for [2, num_blocks, ...],
            1 for [num_blocks, 2, ...].
        staging: The shards of block ``block_ids[i]`` are in block i of these, not in the cache:
            [at least len(block_ids), block_size, H, W] for each of ``caches`` (with parts_dim as
            theirs). They are left as they are.

    Raises:
        TypeError: A cache is no tensor; a block id or a shard is no whole number.
        ValueError: A tensor requires a gradient; shapes, strides, memory or devices that do not
            fit, ids that are out of range or appear twice, shards that do not add up to H.
        NotImplementedError: No implementation takes this call; the message says what each asks for.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be NHD or HND.")
    ids = _block_ids(block_ids)
    if not isinstance(caches, list | tuple):
        raise TypeError(f"caches must be a list of tensors, not a {type(caches).__name__}.")
    given = {f"caches[{i}]": cache for i, cache in enumerate(caches)}
    given |= {f"staging[{i}]": buffer for i, buffer in enumerate(staging or ())}
    arguments.check_tensors(OPERATOR, given)
    parts = _parts(caches, parts_dim)
    sources = parts if staging is None else _parts(staging, parts_dim)
    heads = _check_caches(parts, layout)
    counts = _shard_counts(shards, heads)
    _check_ids(ids, min((int(x.shape[0]) for x in parts), default=0))
    if staging is not None:
        _check_staging(parts, sources, len(ids), layout)
    if layout == HND and staging is None:
        return
    if not parts or not ids or (len(counts) == 1 and staging is None):
        return
    if layout == HND or len(counts) == 1:
        # Nothing to merge, but the bytes are elsewhere.
        for cache, source in zip(parts, sources, strict=True):
            cache[list(ids)] = source[: len(ids)]
        return
    call = MergeCall(parts, sources, ids, counts)
    choice = dispatch.select(OPERATOR, parts[0].device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{OPERATOR} on {parts[0].device.type}: {choice.reason}")
    dispatch.observe(OPERATOR)
    choice.implementation.run(call)


def _block_ids(given: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int32, torch.int64) or given.dim() != 1:
            raise TypeError(
                f"block_ids must be int32 or int64 [N], not {given.dtype} {tuple(given.shape)}."
            )
        given = given.tolist()
    return tuple(whole_numbers("Block ids", list(given)).tolist())


def _parts(caches: Sequence[Tensor], parts_dim: int | None) -> tuple[Tensor, ...]:
    if parts_dim is None:
        return tuple(caches)
    if parts_dim not in (0, 1) or any(cache.dim() != 5 for cache in caches):
        raise ValueError(
            f"parts_dim is {parts_dim}: caches must have five dimensions, K and V in the first or "
            f"the second; they have {sorted({cache.dim() for cache in caches})}."
        )
    return tuple(part for cache in caches for part in cache.unbind(parts_dim))


def _check_caches(parts: tuple[Tensor, ...], layout: str) -> int:
    """The number of heads."""
    if any(x.dim() != 4 for x in parts):
        raise ValueError(
            "Caches must be [num_blocks, block_size, heads, width]; or give parts_dim."
        )
    kinds = {(x.device, *x.shape[1:3]) for x in parts}
    if len(kinds) > 1:
        raise ValueError(
            "Caches must share a device, block size and number of heads; found "
            f"{sorted(map(str, kinds))}."
        )
    for x in parts:
        if x.shape[0] > 1 and x.stride(0) < x[0].numel():
            raise ValueError(
                f"Blocks of {x[0].numel()} elements lie {x.stride(0)} apart: they share memory."
            )
        if x.shape[0] and not x[0].is_contiguous():
            raise ValueError(
                f"A block must be contiguous as {layout} {tuple(x.shape[1:])}; its strides are "
                f"{x.stride()[1:]}: is the layout another one?"
            )
    places = [x.data_ptr() for x in parts if x.numel() and not x.is_meta]
    if len(set(places)) < len(places):
        raise ValueError("A cache is given twice: it would be merged twice, which garbles it.")
    return int(parts[0].shape[1 if layout == HND else 2]) if parts else 0


def _shard_counts(shards: Sequence[int] | int, heads: int) -> tuple[int, ...]:
    if isinstance(shards, int) and not isinstance(shards, bool):
        if shards < 1 or heads % shards:
            raise ValueError(f"{heads} heads cannot be cut into {shards} equal shards.")
        return (heads // shards,) * shards if heads else ()
    if not isinstance(shards, list | tuple):
        raise TypeError(f"shards must be a number of shards, or each one's heads, not {shards!r}.")
    counts = tuple(whole_numbers("Heads of shards", list(shards)).tolist())
    if heads and (min(counts, default=0) < 1 or sum(counts) != heads):
        raise ValueError(f"The shards have {counts} heads, and a block has {heads}.")
    return counts


def _check_ids(ids: tuple[int, ...], num_blocks: int) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError(f"A block would be merged twice, which garbles it; block ids: {ids}.")
    if ids and not 0 <= min(ids) <= max(ids) < num_blocks:
        raise ValueError(
            f"Block ids run from {min(ids)} to {max(ids)}; caches have {num_blocks} blocks."
        )


def _check_staging(
    parts: tuple[Tensor, ...], sources: tuple[Tensor, ...], count: int, layout: str
) -> None:
    if len(parts) != len(sources):
        raise ValueError(f"There are {len(parts)} caches and {len(sources)} staging buffers.")
    _check_caches(sources, layout)
    for cache, source in zip(parts, sources, strict=True):
        alike = (cache.dtype, cache.device, cache.shape[1:]) == (
            source.dtype,
            source.device,
            source.shape[1:],
        )
        if not alike or source.shape[0] < count:
            raise ValueError(
                f"Staging for {count} blocks of {tuple(cache.shape[1:])} {cache.dtype} on "
                f"{cache.device} is {tuple(source.shape)} {source.dtype} on {source.device}."
            )


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", merge_reference.run)
)


def dtype_of(width: int) -> torch.dtype:
    """The integer type of ``width`` bytes: elements are moved as these."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]

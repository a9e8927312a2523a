"""merge_head_shards_ through the Triton kernel: what it takes and how it is launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.kv_layout import merge_tiles
from ascend_patch.kernels.kv_layout.merge import OPERATOR, MergeCall, dtype_of
from ascend_patch.kernels.triton_device import has_triton, on_device, vector_cores

NAME = "triton"
_PRIORITY = 10
_MOST_WARPS, _BYTES_A_WARP = 8, 4 << 10
# Of an Ascend vector core's unified buffer. In place a tile has some columns of all rows, and what
# is moved at a time is a row's part: as long as fits, without a second buffer. From staging it has
# whole rows, and the compiler keeps two.
_ASCEND_BYTES = 192 << 10
_ASCEND_IN_PLACE, _ASCEND_STAGED = 128 << 10, 64 << 10
_ASCEND_LEAST_MOVE = 32


@dataclass(frozen=True)
class Launch:
    """A launch: the kernel's values and constants, and how many tasks there are."""

    values: tuple[Any, ...]
    constants: dict[str, Any]
    tasks: int
    warps: int


def supports(call: MergeCall) -> tuple[bool, str]:
    """Can the kernel take this call? (ok, reason); see ``dispatch.Implementation``."""
    if call.caches[0].device.type == "npu":
        return _supports_on_npu(call)
    rows = call.block_size * call.heads // merge_tiles.heads_of_row(call.shards)
    if rows > 4096:
        return False, "a block must have 4096 rows at most: tokens times shards"
    return True, ""


def _supports_on_npu(call: MergeCall) -> tuple[bool, str]:
    if len(set(call.shards)) > 1:
        return False, "shards must have equally many heads"
    for count, name in ((call.block_size, "block_size"), (len(call.shards), "number of shards")):
        if count & (count - 1):
            return False, f"the {name} must be a power of two"
    if call.block_size * len(call.shards) * _ASCEND_LEAST_MOVE > _ASCEND_IN_PLACE:
        return False, "32 bytes of each row of a block must fit the unified buffer"
    return True, ""


def run(call: MergeCall) -> None:
    """``merge_reference.run`` in one launch; one for each width where parts have several."""
    device = call.caches[0].device
    for part in by_width(call):
        launch(prepare(part), device)


def by_width(call: MergeCall) -> Iterator[MergeCall]:
    """The caches whose heads have equally many bytes, together."""
    widths = [x.shape[3] * x.element_size() for x in call.caches]
    for width in dict.fromkeys(widths):
        which = [i for i, w in enumerate(widths) if w == width]
        caches, sources = (tuple(group[i] for i in which) for group in (call.caches, call.sources))
        if width:
            yield replace(call, caches=caches, sources=caches if call.in_place else sources)


def launch(prepared: Launch, device: torch.device, cores: int = 0) -> None:
    """Run the kernel on the current stream."""
    from ascend_patch.kernels.kv_layout.merge_kernel import merge_kernel

    programs = prepared.tasks
    if prepared.constants["LOOPS"]:
        programs = min(programs, cores or vector_cores(device.index or 0))
    options = {} if prepared.constants["LOOPS"] else {"num_warps": prepared.warps}
    with on_device(device):
        merge_kernel[(programs,)](*prepared.values, **prepared.constants, **options)


def prepare(call: MergeCall, on_npu: bool | None = None) -> Launch:
    """What ``merge_kernel`` is launched with, for caches of one width; copies to the device."""
    cache = call.caches[0]
    if on_npu is None:
        on_npu = cache.device.type == "npu"
    places = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in (*call.caches, *call.sources)]
    first = cache.data_ptr()
    head = cache.shape[3] * cache.element_size()
    counts = [place - first for place, _ in places] + [step for _, step in places]
    offset = cache.storage_offset() * cache.element_size()
    common = gcd(head, offset, *counts)
    width = next(w for w in (4 if on_npu else 8, 4, 2, 1) if common % w == 0)
    row = merge_tiles.heads_of_row(call.shards) * head // width
    groups = torch.zeros(0, dtype=torch.int64)
    if on_npu:
        tiles = _ascend_tiles(call, row, width)
    else:
        tiles, table = merge_tiles.cuda_tiles(
            call.block_size, call.shards, row, width, call.in_place
        )
        groups = torch.from_numpy(table).to(torch.int64).ravel()
    caches = len(call.caches)
    where = [
        (into - first, step, at - first, from_step)
        for (into, step), (at, from_step) in zip(places[:caches], places[caches:], strict=True)
    ]
    numbers = torch.tensor(where).floor_divide(width).ravel()
    ids = torch.tensor((call.block_ids, call.source_ids)).ravel()
    sizes = [len(numbers), len(ids), len(groups)]
    # One copy for all of them; a kernel takes no empty tensor for a pointer.
    small = torch.cat((numbers, ids, groups, groups.new_zeros(1))).to(cache.device)
    tables = small[:-1].split(sizes)
    tasks = caches * len(call.block_ids) * tiles.programs
    values = (_integers(cache, width), *tables[:2], small[-1 - sizes[2] :], tasks)
    constants = {
        "GROUPS": tiles.groups,
        "CHUNKS": tiles.chunks,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "ROW": row,
        "SHARDS": len(call.shards),
        "TOKENS": call.block_size,
        "ALIGNED": gcd(16, *counts, row * width) // width or 1,
        "LISTED": not on_npu,
        "LOOPS": on_npu,
    }
    warps = min(_MOST_WARPS, max(1, tiles.rows * tiles.columns * width // _BYTES_A_WARP))
    return Launch((*values, len(call.block_ids)), constants, tasks, warps)


def _integers(cache: Tensor, width: int) -> Tensor:
    """The cache's memory from its first element on, as integers of ``width`` bytes."""
    return cache.view(dtype_of(width))


def _ascend_tiles(call: MergeCall, row: int, width: int) -> merge_tiles.Tiles:
    """All shards of some tokens, whole rows. In place of all tokens, and as many columns as fit."""
    shards, power = len(call.shards), 1 << (row - 1).bit_length()
    tokens = call.block_size
    if not call.in_place:
        fit = _ASCEND_STAGED // (shards * width * power)
        tokens = min(tokens, 1 << max(0, fit.bit_length() - 1))
    most = _ASCEND_IN_PLACE if call.in_place else _ASCEND_STAGED
    fit = most // (tokens * shards * width)
    columns = min(1 << (fit.bit_length() - 1), power)
    return merge_tiles.Tiles(row, tokens, columns, call.block_size // tokens)


def ascend_buffer_bytes(prepared: Launch) -> int:
    """Unified buffer of a launch on Ascend: one tile, or two where two fit."""
    sizes = (prepared.constants[name] for name in ("ROWS", "SHARDS", "COLUMNS"))
    tile: int = prod(sizes) * prepared.values[0].element_size()
    return 2 * tile if 2 * tile <= _ASCEND_BYTES else tile


def register() -> None:
    """Offer the kernel where a GPU's Triton is installed."""
    if has_triton("nvidia"):
        dispatch.register(OPERATOR, "cuda", _implementation())


def register_on_npu() -> bool:
    """Offer the kernel on NPUs; whether this process has Triton for Ascend."""
    if not has_triton("ascend"):
        return False
    dispatch.register(OPERATOR, "npu", _implementation())
    return True


def _implementation() -> dispatch.Implementation:
    return dispatch.Implementation(NAME, run, supports, _PRIORITY)

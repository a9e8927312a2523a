"""Tile sizes of the rotary kernels: plain arithmetic and a table, no tuning at run time.

Nothing here imports torch or triton, and nothing depends on the number of tokens: a kernel that has
been compiled once serves every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

# Ascend: a larger grid fails to launch, and a vector core has 192 KiB of unified buffer.
MAX_PROGRAMS = 65535
UNIFIED_BUFFER = 192 * 1024

# Bytes of unified buffer for each pair of elements in a tile: what AscendNPU IR 1.2.0 planned for
# the shapes in cases.py (Ascend910B3, both buffers of its double buffering), rounded up. The test
# of the offline compiler holds the plan against it.
_PAIR_BYTES = {True: 36, False: 104}
# Likewise for each element that is copied, as a multiple of its size.
_REST_FACTOR = 4
# Three rows (MRoPE) of cosines and sines, as stored and in fp32, two buffers each.
_ROW_BYTES = 96

# CUDA: more than this many pairs in one tile spill registers (8 warps, 32 pairs a thread).
_CUDA_PAIRS = 8192
# (bytes of a token's heads up to, warps a program): measured on one H200, see docs/bench/rope.md.
_CUDA_WARPS = ((2048, 1), (6144, 2), (16384, 4))
_CUDA_WARPS_MOST = 8
# Programs for each multiprocessor: its 2048 threads, as full as 64 registers a thread leave it.
_CUDA_THREADS = 2048


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut up: heads a tile, padded widths, warps a program (CUDA)."""

    query_tile: int
    key_tile: int
    half_pad: int
    rest_pad: int
    num_warps: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 2."""
    return 1 << max(n - 1, 0).bit_length()


def head_tile(heads: int, most: int) -> int:
    """Heads in a tile: a power of two, at most ``most``.

    The largest one that leaves no more than a quarter of the lanes idle: 16 for 40 heads, not 64.
    """
    tile = min(next_power_of_two(heads), most)
    while tile > 1 and 4 * heads < 3 * tile * -(-heads // tile):
        tile //= 2
    return tile


def unified_buffer_bytes(
    tiles: Tiles, rest: int, itemsize: int, is_neox_style: bool, copies_rest: bool
) -> int:
    """Upper bound of the unified buffer that a program takes on Ascend, in bytes.

    ``rest`` is head_size - rotary_dim; ``itemsize`` that of query. Query and key are both counted:
    the compiler overlaps the two.
    """
    heads = tiles.query_tile + tiles.key_tile
    pairs = heads * tiles.half_pad * _PAIR_BYTES[is_neox_style]
    copied = heads * tiles.rest_pad * itemsize * _REST_FACTOR if rest and copies_rest else 0
    return pairs + copied + tiles.half_pad * _ROW_BYTES


def ascend_tiles(
    query_heads: int,
    key_heads: int,
    head_size: int,
    rotary_dim: int,
    itemsize: int,
    is_neox_style: bool,
) -> Tiles | None:
    """The largest tiles that fit the unified buffer; None if not even one head does."""
    half_pad, rest_pad = _padded(head_size, rotary_dim)
    most = next_power_of_two(max(query_heads, key_heads))
    while most:
        tiles = Tiles(
            query_tile=head_tile(query_heads, most),
            key_tile=head_tile(key_heads, most),
            half_pad=half_pad,
            rest_pad=rest_pad,
            num_warps=1,
        )
        rest = head_size - rotary_dim
        if unified_buffer_bytes(tiles, rest, itemsize, is_neox_style, True) <= UNIFIED_BUFFER:
            return tiles
        most //= 2
    return None


def cuda_tiles(
    query_heads: int, key_heads: int, head_size: int, rotary_dim: int, itemsize: int
) -> Tiles:
    """Tiles that stay in registers, and the warps that the table gives for a token's bytes."""
    half_pad, rest_pad = _padded(head_size, rotary_dim)
    width = max(half_pad, rest_pad // 2)
    most = max(_CUDA_PAIRS // next_power_of_two(width), 1)
    size = (query_heads + key_heads) * head_size * itemsize
    warps = next((w for limit, w in _CUDA_WARPS if size <= limit), _CUDA_WARPS_MOST)
    return Tiles(
        query_tile=head_tile(query_heads, most),
        key_tile=head_tile(key_heads, most),
        half_pad=half_pad,
        rest_pad=rest_pad,
        num_warps=warps,
    )


def programs(tokens: int, cores: int, num_warps: int, on_cuda: bool) -> int:
    """The grid: a program for each token, up to what the device runs at a time.

    ``cores`` are vector cores on Ascend, multiprocessors on CUDA.
    """
    at_a_time = cores * max(_CUDA_THREADS // (32 * num_warps), 1) if on_cuda else cores
    return min(tokens, at_a_time, MAX_PROGRAMS)


def _padded(head_size: int, rotary_dim: int) -> tuple[int, int]:
    return next_power_of_two(rotary_dim // 2), next_power_of_two(head_size - rotary_dim)

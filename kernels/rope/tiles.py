"""Tile sizes of the rotary kernels: plain arithmetic and a table, no tuning at run time.

Nothing here imports torch or triton. The number of tokens decides nothing on Ascend; on CUDA it
picks one of two variants of a kernel, so that two compilations serve every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Ascend: a larger grid fails to launch, and a vector core has 192 KiB of unified buffer.
MAX_PROGRAMS = 65535
UNIFIED_BUFFER = 192 * 1024
# CUDA: the first axis of a grid. A program that loops instead costs up to a seventh (65536 tokens).
_CUDA_PROGRAMS = 2**31 - 1

# Bytes of unified buffer for each pair of elements in a tile: what AscendNPU IR 1.2.0 planned for
# the shapes in cases.py (Ascend910B3, both buffers of its double buffering), rounded up. The test
# of the offline compiler holds the plan against it.
_PAIR_BYTES = {True: 36, False: 104}
# The same for split_qkv_rmsnorm_rope, which keeps its inputs for the sum of their squares.
_FUSED_PAIR_BYTES = {True: 72, False: 200}
_FUSED_REST_BYTES = {True: 24, False: 36}
_FUSED_ROW_BYTES = {True: 192, False: 832}
# Likewise for each element that is copied, as a multiple of its size.
_REST_FACTOR = 4
# Three rows (MRoPE) of cosines and sines, as stored and in fp32, two buffers each.
_ROW_BYTES = 96

# CUDA, measured on one H200 by `docs/bench/rope_sweep.py` (docs/bench/rope-sweep.txt, which shows
# how far from the best variant these are). Up to 256 tokens each tile of heads is a program of its
# own, which loads its heads before it waits for the position; beyond that a program takes a token.
# Above 8192 pairs, which no shape there reaches, a thread's share would leave its registers.
_CUDA_WARPS = 4
_CUDA_SPLIT_TOKENS = 256
_CUDA_SPLIT_PAIRS = 1024
_CUDA_PAIRS = 8192
_FUSED_SPLIT_PAIRS = 512
_FUSED_REST_PAIRS = 1024
# One number of tokens for each variant that a device type has: what a warm-up goes through.
VARIANTS = {"cuda": (1, _CUDA_SPLIT_TOKENS + 1), "npu": (1,)}


@dataclass(frozen=True)
class Tiles:
    """How a launch is cut up: heads a tile, padded widths, and on CUDA warps and the grid's axes.

    ``split``: each tile of heads is a program of its own. ``loops``: there are fewer programs than
    tokens. ``shared_row``: query and key share the row of angles that was read. ``early``:
    early_kernel instead of rotary_kernel (CUDA only).
    """

    query_tile: int
    key_tile: int
    half_pad: int
    rest_pad: int
    num_warps: int = _CUDA_WARPS
    split: bool = False
    loops: bool = True
    shared_row: bool = True
    early: bool = False

    def parts(self, query_heads: int, key_heads: int) -> int:
        """Programs that share a token."""
        if not self.split:
            return 1
        return -(-query_heads // self.query_tile) + -(-key_heads // self.key_tile)


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
        )
        rest = head_size - rotary_dim
        if unified_buffer_bytes(tiles, rest, itemsize, is_neox_style, True) <= UNIFIED_BUFFER:
            return tiles
        most //= 2
    return None


def fused_ascend_tiles(
    query_heads: int,
    key_heads: int,
    head_size: int,
    rotary_dim: int,
    itemsize: int,
    is_neox_style: bool,
) -> Tiles | None:
    """The largest tiles with which split_qkv_rmsnorm_rope fits the unified buffer, or None."""
    half_pad, rest_pad = _padded(head_size, rotary_dim)
    most = next_power_of_two(max(query_heads, key_heads))
    while most:
        tiles = Tiles(head_tile(query_heads, most), head_tile(key_heads, most), half_pad, rest_pad)
        if fused_unified_buffer_bytes(tiles, itemsize, is_neox_style) <= UNIFIED_BUFFER:
            return tiles
        most //= 2
    return None


def fused_unified_buffer_bytes(tiles: Tiles, itemsize: int, is_neox_style: bool) -> int:
    """Estimate of the unified buffer that split_qkv_rmsnorm_rope takes on Ascend, in bytes.

    Not a bound: in GPT-J style the compiler planned up to twice as much for small tiles. Near the
    limit it gives up its double buffering: tiles with estimates of up to 2.2 times the unified
    buffer were compiled (80 shapes drawn at random, AscendNPU IR 1.2.0), and all of them fit.
    """
    heads = tiles.query_tile + tiles.key_tile
    pairs = tiles.half_pad * _FUSED_PAIR_BYTES[is_neox_style]
    rest = tiles.rest_pad * _FUSED_REST_BYTES[is_neox_style]
    copied = 2 * (2 * tiles.half_pad + tiles.rest_pad) * itemsize
    rows = tiles.half_pad * _FUSED_ROW_BYTES[is_neox_style] + tiles.rest_pad * 32
    return heads * (pairs + rest + copied) + rows


def cuda_tiles(
    tokens: int, query_heads: int, key_heads: int, head_size: int, rotary_dim: int
) -> Tiles:
    """Tiles that stay in registers; a small batch is split further and goes to early_kernel."""
    heads = query_heads, key_heads
    if tokens > _CUDA_SPLIT_TOKENS:
        return _cuda_tiles(tokens, *heads, head_size, rotary_dim, _CUDA_PAIRS)
    return early_tile(_cuda_tiles(tokens, *heads, head_size, rotary_dim, _CUDA_SPLIT_PAIRS))


def fused_cuda_tiles(
    tokens: int, query_heads: int, key_heads: int, head_size: int, rotary_dim: int
) -> Tiles:
    """The same for split_qkv_rmsnorm_rope: with a rest, one warp a program and a smaller tile.

    The sum of squares then runs over tiles of two layouts; within a warp no barrier is between them
    (16384 tokens, heads of 256 and 64 of them rotary: 104 us instead of 170).
    """
    split = tokens <= _CUDA_SPLIT_TOKENS
    partial = rotary_dim < head_size
    pairs = _FUSED_REST_PAIRS if partial else _CUDA_PAIRS
    if split:
        pairs = _FUSED_SPLIT_PAIRS
    tiles = _cuda_tiles(tokens, query_heads, key_heads, head_size, rotary_dim, pairs)
    return replace(tiles, split=split, num_warps=1 if partial else _CUDA_WARPS)


def _cuda_tiles(
    tokens: int, query_heads: int, key_heads: int, head_size: int, rotary_dim: int, pairs: int
) -> Tiles:
    half_pad, rest_pad = _padded(head_size, rotary_dim)
    most = max(pairs // max(half_pad, rest_pad // 2), 1)
    return Tiles(
        query_tile=head_tile(query_heads, most),
        key_tile=head_tile(key_heads, most),
        half_pad=half_pad,
        rest_pad=rest_pad,
        loops=tokens > _CUDA_PROGRAMS,
        shared_row=False,
    )


def early_tile(tiles: Tiles) -> Tiles:
    """Tiles of one size, one a program: what early_kernel takes."""
    tile = max(tiles.query_tile, tiles.key_tile)
    return replace(tiles, query_tile=tile, key_tile=tile, split=True, loops=False, early=True)


def grid(
    tiles: Tiles, tokens: int, query_heads: int, key_heads: int, cores: int = MAX_PROGRAMS
) -> tuple[int, int]:
    """Programs over tokens and over the tiles of a token; at least one of each.

    ``cores``: programs that may run at a time where a program loops; the loops are of equal length.
    """
    rounds = -(-tokens // cores) if tiles.loops else 1
    return max(-(-tokens // max(rounds, 1)), 1), tiles.parts(query_heads, key_heads)


def _padded(head_size: int, rotary_dim: int) -> tuple[int, int]:
    return next_power_of_two(rotary_dim // 2), next_power_of_two(head_size - rotary_dim)

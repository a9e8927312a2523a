"""How the convolutions are cut up: arithmetic and a table, no tuning at run time.

Nothing here imports torch or triton.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64
# Channels for which what AscendNPU IR 1.2.0 plans fits the 192 KiB of a vector core's unified
# buffer with both buffers of its double buffering: at twice as many it keeps one.
_NPU_CHANNELS = {2: 1024, 4: 512}
_NPU_UPDATE_CHANNELS = {2: 2048, 4: 1024}
# CUDA, not measured yet: lanes read 16 bytes each, a warp a row.
_CUDA_CHANNELS = 256
_CUDA_TILE = 16
_CUDA_WARPS = 4
_UPDATE_CHANNELS = 256
_UPDATE_WARPS = 1


@dataclass(frozen=True)
class Tiles:
    """Channels a program takes, tokens that a tile has; on CUDA its warps.

    ``rolls``: tokens one after the other, each read once.
    """

    channels: int
    tile: int = 1
    warps: int = 4
    rolls: bool = True


def prefill_tiles(channels: int, itemsize: int, kind: str) -> Tiles:
    """For causal_conv1d on a `cuda` or `npu`; elements of x have so many bytes."""
    if kind == "npu":
        return Tiles(min(_NPU_CHANNELS[itemsize], next_power_of_two(channels)))
    most = min(_CUDA_CHANNELS, next_power_of_two(channels))
    return Tiles(most, _CUDA_TILE, _CUDA_WARPS, rolls=False)


def update_tiles(channels: int, itemsize: int, kind: str) -> Tiles:
    """For causal_conv1d_update."""
    if kind == "npu":
        return Tiles(min(_NPU_UPDATE_CHANNELS[itemsize], next_power_of_two(channels)))
    return Tiles(min(_UPDATE_CHANNELS, next_power_of_two(channels)), warps=_UPDATE_WARPS)


def programs(items: int, channels: int, tiles: Tiles, cores: int) -> int:
    """Of a launch over so many chunks or sequences: a multiple of the blocks of channels.

    ``cores`` is 0 where each item has a program of its own (CUDA).
    """
    blocks = -(-channels // tiles.channels)
    groups = items if not cores else max(1, min(items, cores // blocks))
    return blocks * groups


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

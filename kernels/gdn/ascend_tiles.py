"""How chunk_gated_delta_rule is cut up on Ascend: plain arithmetic, no tuning at run time.

Nothing here imports torch or triton.
"""

from __future__ import annotations

CHUNK = 64
UNIFIED_BUFFER = 192 * 1024
# Columns of K and V that prepare_loop holds at a time.
TILE = 64
# Of a state; fewer would leave a vector core, which has half of them, less than a register's width.
_COLUMNS = (128, 64, 32)
# Matrices [CHUNK, CHUNK] in float32 that prepare_loop holds at once: products, decays, the system,
# and what a comparison and a product are made of. AscendNPU IR 1.2.0 gives up its double buffering
# to make do with them.
_MATRICES = 8


def prepare_bytes(tile: int = TILE) -> int:
    """Estimate of the unified buffer that prepare_loop takes, whatever K and V are.

    Its matrices, and of a tile of rows what is loaded, in float32, and scaled.
    """
    return _MATRICES * CHUNK * CHUNK * 4 + CHUNK * tile * (2 + 4 + 2)


def scan_bytes(size: int, columns: int) -> int:
    """Upper bound of the unified buffer that scan_loop takes, without double buffering.

    Both vector cores of a block share it. What AscendNPU IR 1.2.0 asked for where it was too much:
    six times a state while that is turned into or out of the layout of the cache, or within the
    loop two of it and rows of a chunk for each column.

    Args:
        size: K.
        columns: Of the state that a program holds.
    """
    turning = 6 * size * columns + 128
    looping = 2 * size * columns + 642 * columns
    return max(turning, looping)


def scan_columns(size: int, width: int, sequences: int, heads: int, cores: int) -> int:
    """Columns of the state for one program: as many as fit, but enough programs for all cores.

    q, k, w and p are read once for each part of a state, so parts are only made for idle cores.

    Args:
        size: K.
        width: V.
        sequences: Of the batch.
        heads: Value heads of this rank.
        cores: Cube cores that programs run on.
    """
    fitting = [c for c in _COLUMNS if c <= width and scan_bytes(size, c) <= UNIFIED_BUFFER]
    enough = [c for c in fitting if sequences * heads * (width // c) >= cores]
    return enough[0] if enough else fitting[-1]

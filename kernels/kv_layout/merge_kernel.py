"""merge_head_shards_ in Triton: rows of blocks are read, and written where they belong.

One source for CUDA and for Ascend. Importing this module imports triton.
"""

# Triton reads the annotations of a kernel itself: what is not a constant has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _move(
    task,
    base,
    places,
    ids,
    groups,
    blocks,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    SHARDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One task; see merge_kernel."""
    chunk = task % CHUNKS
    group = task // CHUNKS % GROUPS
    block = task // (CHUNKS * GROUPS) % blocks
    cache = places + task // (CHUNKS * GROUPS) // blocks * 4
    # In int64: caches lie anywhere in memory, and a block's number times its size is large.
    into = tl.load(cache) + tl.load(ids + block) * tl.load(cache + 1)
    at = tl.load(cache + 2) + tl.load(ids + blocks + block) * tl.load(cache + 3)
    into = base + tl.multiple_of(into, ALIGNED)
    at = base + tl.multiple_of(at, ALIGNED)
    if LISTED:
        row = tl.arange(0, ROWS)
        source = tl.load(groups + group * ROWS + row).to(tl.int32)[:, None]
        target = tl.load(groups + (GROUPS + group) * ROWS + row).to(tl.int32)[:, None]
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        here = source >= 0
        if ROW % COLUMNS:
            here &= column < ROW
        rows = tl.load(at + source * ROW + column, mask=here)
        # Every row is read before one is written: they change places.
        tl.debug_barrier()
        tl.store(into + target * ROW + column, rows, mask=here)
    else:
        token = (group * ROWS + tl.arange(0, ROWS))[:, None, None]
        shard = tl.arange(0, SHARDS)[None, :, None]
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
        source = at + (shard * TOKENS + token) * ROW + column
        target = into + (token * SHARDS + shard) * ROW + column
        if ROW % COLUMNS:
            tl.store(target, tl.load(source, mask=column < ROW), mask=column < ROW)
        else:
            tl.store(target, tl.load(source))


@triton.jit(do_not_specialize=["tasks", "blocks"])
def merge_kernel(
    base,
    places,
    ids,
    groups,
    tasks,
    blocks,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    SHARDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr,
    LISTED: tl.constexpr,
    LOOPS: tl.constexpr,
):
    """Each task is some columns of some rows of one block of one cache.

    Args:
        base: Integers of a cache's itemsize; any address that the others are counted from.
        places: int64 [caches, 4]: in elements, where a cache begins, from a block to the next, and
            the same two of its source.
        ids: int64 [2, blocks]: block numbers in the cache and in the source.
        groups: int64 [2, GROUPS, ROWS] with LISTED: rows that are read, and where they go.
        tasks: caches * blocks * GROUPS * CHUNKS; each program takes one, with LOOPS every n-th.
        ROW: Elements of a row. ALIGNED: elements that all places are multiples of.
        SHARDS, TOKENS: Of a block. Without LISTED the shards are equal, and a task has all rows of
            ROWS tokens; in place those of all tokens.
    """
    first = tl.program_id(0)
    if LOOPS:
        for task in range(first, tasks, tl.num_programs(0)):
            _move(
                task,
                base,
                places,
                ids,
                groups,
                blocks,
                GROUPS,
                CHUNKS,
                ROWS,
                COLUMNS,
                ROW,
                SHARDS,
                TOKENS,
                ALIGNED,
                LISTED,
            )
    else:
        _move(
            first,
            base,
            places,
            ids,
            groups,
            blocks,
            GROUPS,
            CHUNKS,
            ROWS,
            COLUMNS,
            ROW,
            SHARDS,
            TOKENS,
            ALIGNED,
            LISTED,
        )

"""What a KV transfer costs: scripts/bench kv [merge | descriptors | ttft].

`merge`, on a CUDA device: merge_head_shards_ over one request's blocks, in place and from staging
buffers, beside torch and a copy of as many bytes. Every call is checked, byte by byte, before
anything is timed. A time is that of the kernel inside a captured graph: median and 95th percentile.
`call` is the whole Python call, tables and launch, ended by a wait for the device. Shares of the
copy in one run are comparable, times of two machines are not.

`descriptors`, on any machine: byte ranges for each ratio of tensor parallel sizes, how many of them
a block takes before and after neighbours are joined, and the host's time to list them; `staged` is
how many there are where heads of tokens go through a buffer of 64 MiB.

`ttft`, on any machine: time to the first token through real servers, for each ratio. It has options
of its own: scripts/bench kv ttft --help.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bench_rope import machine, replay, write_csv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# 268 MB each: what facts of peers were measured on, the layers of a model, one that is uneven.
SHARDS = ((4, 4), (2, 2, 2, 2), (1,) * 8)
REQUESTS = ((1, 1024), (4, 128), (32, 16))  # caches are twice the layers, but for the first
EXTRA = ((2, 2, 2), (2, 1))
TILES = (16, 32, 64)  # KiB
REPLAYS = 300
MERGE = ("shards", "caches", "blocks", "what", "tile_kib", "p50_us", "p95_us", "bytes", "gb_s")
MERGE += ("share_of_copy",)
RATIOS = ((1, 1), (2, 2), (2, 1), (4, 1), (8, 1), (4, 2), (8, 2), (16, 4), (1, 2), (1, 4), (2, 4))
DESCRIPTORS = ("prefill_tp", "decode_tp", "layout", "kv_heads", "blocks", "scattered", "peers")
DESCRIPTORS += ("ranges_per_block", "ranges", "median_bytes", "plan_us", "list_ms", "staged")
STAGING = 64 << 20  # bytes of a buffer


def main(argv: list[str]) -> int:
    if argv[:1] == ["ttft"]:
        from _bench_kv_ttft import main as ttft

        return ttft(argv[1:])
    parser = argparse.ArgumentParser(prog="scripts/bench kv", description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="merge", choices=("merge", "descriptors", "ttft")
    )
    parser.add_argument("--out", type=Path, help="folder for kv_merge.csv or kv_descriptors.csv")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    parser.add_argument("--sweep", action="store_true", help="tiles of other sizes too")
    arguments = parser.parse_args(argv)
    import torch

    facts: dict[str, str] = {}
    columns: tuple[str, ...] = DESCRIPTORS
    rows = count_ranges()
    if arguments.what == "merge":
        if not torch.cuda.is_available():
            print("scripts/bench kv merge needs a CUDA device; none is available here.")
            return 1
        facts = machine(arguments.commit)
        columns, rows = MERGE, measure(TILES if arguments.sweep else (0,))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(" ".join(f"{column:>16}" for column in columns))
    table = []
    for row in rows:
        print(" ".join(f"{value!s:>16}" for value in row), flush=True)
        table.append(dict(zip(columns, row, strict=True)))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / f"kv_{arguments.what}.csv", table, facts, columns)
    return 0


def measure(tiles: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Rows of all shapes."""
    from ascend_patch.kernels.kv_layout.cases import MergeCase

    for shards in SHARDS:
        for layers, blocks in REQUESTS:
            yield from of_case(MergeCase(shards, blocks, layers=layers), layers == 1, tiles)
    for shards in EXTRA:
        yield from of_case(MergeCase(shards, 128, layers=4), False, tiles)


def of_case(case: Any, single: bool, tiles: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """The rows of one request; ``single``: K alone of one layer."""
    import torch

    from ascend_patch.kernels import kv_layout
    from ascend_patch.kernels.kv_layout import cases, merge, merge_reference, merge_tiles
    from ascend_patch.kernels.kv_layout import merge_triton as triton_form

    caches, ids, staging = cases.make_inputs(replace(case, staging=True), 0, "cuda")
    assert staging is not None
    if single:
        caches, staging = caches[:1], staging[:1]
    device, count = caches[0].device, len(case.shards)
    moved = case.total_bytes // (2 if single else 1) * 2
    name = "+".join(map(str, case.shards))
    head = (name, len(caches), case.blocks)
    call = merge.MergeCall(tuple(caches), tuple(caches), tuple(ids), case.shards)
    staged = replace(call, sources=tuple(staging))
    even = len(set(case.shards)) == 1
    index = torch.tensor(ids, device=device)
    target = [torch.empty_like(x) for x in staging]

    def permute() -> None:
        for cache in target:
            flat = cache.view(len(ids), count, case.block_size, -1)
            flat.copy_(flat.transpose(1, 2).reshape(flat.shape))

    def gather() -> None:
        for cache in caches:
            cache[index] = merge_reference.merged(cache[index], case.shards)

    def copy() -> None:
        for into, source in zip(target, staging, strict=True):
            into.copy_(source)

    def one(prepared: Any) -> Callable[[], None]:
        return lambda: triton_form.launch(prepared, device)

    def timed(what: str, run: Callable[[], Any], tile: int | str = "") -> tuple[Any, ...]:
        p50, p95 = replay(run, REPLAYS)
        base.setdefault("copy", p50)
        share = round(base["copy"] / p50, 3)
        rest = (round(p50, 2), round(p95, 2), moved, round(moved / p50 / 1e3, 1), share)
        return (*head, what, tile, *rest)

    base: dict[str, float] = {}
    yield timed("copy", copy)
    if even:
        yield timed("torch permute", permute)
    yield timed("torch gather", gather)
    before = merge_tiles.TILE_BYTES
    for size in tiles:
        merge_tiles.TILE_BYTES = size << 10 or before
        for what, this in (("in place", call), ("from staging", staged)):
            prepared = triton_form.prepare(this)
            check(this, one(prepared), what)
            yield timed(what, one(prepared), merge_tiles.TILE_BYTES >> 10)
    merge_tiles.TILE_BYTES = before

    def whole() -> None:
        kv_layout.merge_head_shards_(caches, ids, case.shards)
        torch.cuda.synchronize()

    times = sorted(elapsed(whole) for _ in range(100))
    share = round(base["copy"] / times[50], 3)
    yield (*head, "call", "", *(round(t, 2) for t in (times[50], times[95])), moved, "", share)


def check(call: Any, run: Callable[[], None], what: str) -> None:
    """Every byte of the blocks against torch, and those of the others against what they were."""
    import torch

    from ascend_patch.kernels.kv_layout import merge_reference

    device = call.caches[0].device
    index, where = (torch.tensor(x, device=device) for x in (call.block_ids, call.source_ids))
    before = [cache.clone() for cache in call.caches]
    sources = before if call.in_place else call.sources
    want = [merge_reference.merged(source[where], call.shards) for source in sources]
    run()
    for cache, old, blocks in zip(call.caches, before, want, strict=True):
        old[index] = blocks
        if not torch.equal(cache.view(torch.int16), old.view(torch.int16)):
            raise SystemExit(f"{what} of {call.shards} is wrong: nothing was timed.")


def elapsed(run: Callable[[], Any]) -> float:
    """Microseconds."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def count_ranges() -> Iterator[tuple[Any, ...]]:
    """A prompt of 8192 tokens: 36 layers, 8 KV heads of 128, bfloat16; and a latent model."""
    from random import Random
    from statistics import median

    from ascend_patch.kernels import kv_layout

    blocks = 64
    for layout, heads in (("NHD", 8), ("HND", 8), ("NHD", 1)):
        group = kv_layout.LayerGroup(36, heads, (128, 128) if heads > 1 else (512, 64))
        for tp in RATIOS:
            sides = (kv_layout.Side((group,), n, layout=layout) for n in tp)
            topology = kv_layout.Topology(*sides)
            kv_layout.plan_transfers.cache_clear()
            start = time.perf_counter()
            plan = kv_layout.plan_transfers(topology, direction="pull")
            planning = (time.perf_counter() - start) * 1e6
            if isinstance(plan, kv_layout.Refusal):
                raise SystemExit(plan.sentence)
            for scattered in (False, True):
                ids = list(range(blocks))
                if scattered:
                    Random(0).shuffle(ids)
                start = time.perf_counter()
                found = [ranges(plan, source, ids) for source in plan.sources(0)]
                listing = (time.perf_counter() - start) * 1e3
                lengths = [length for lists in found for length in lists[2]]
                row = (
                    *tp,
                    layout,
                    heads,
                    blocks,
                    scattered,
                    len(found),
                    plan.descriptors_per_block,
                )
                times = (round(planning), round(listing, 2), through_buffer(plan, ids))
                yield (*row, len(lengths), round(median(lengths)), *times)


def through_buffer(plan: Any, ids: list[int]) -> int:
    """Ranges of decode rank 0, those of heads of tokens made one for a block."""
    from ascend_patch.kernels import kv_layout

    count = 0
    pairs = kv_layout.match_blocks(plan.topology, ids, list(range(len(ids))))
    for source in plan.sources(0):
        sizes = plan.topology.prefill.regions(source), plan.topology.decode.regions(0)
        bases = [[i << 34 for i in range(len(regions))] for regions in sizes]
        places = {"prefill_bases": bases[0], "decode_bases": bases[1]}
        whole = kv_layout.descriptors(plan, source, 0, pairs, **places, staged=True)
        buffer = {"staging_base": 1 << 50, "staging_bytes": STAGING}
        rounds = kv_layout.staged_rounds(plan, source, 0, pairs, **places, **buffer)
        count += len(whole) + sum(len(one.ranges) for one in rounds)
    return count


def ranges(plan: Any, source: int, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What decode rank 0 takes from a prefill rank."""
    from ascend_patch.kernels import kv_layout

    pairs = kv_layout.match_blocks(plan.topology, ids, list(range(len(ids))))
    sizes = plan.topology.prefill.regions(source), plan.topology.decode.regions(0)
    bases = [[i << 34 for i in range(len(regions))] for regions in sizes]
    found = kv_layout.descriptors(
        plan, source, 0, pairs, prefill_bases=bases[0], decode_bases=bases[1]
    )
    return found.lists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

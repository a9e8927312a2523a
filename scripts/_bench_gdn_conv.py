"""Convolutions and the gated norm of GDN layers on a CUDA device: scripts/bench gdn_conv.

Qwen3-Next's widths (8192 channels of 4 taps, 32 value heads of 128, bfloat16) at TP 1, 2, 4 and 8;
x, and where the row says `sliced` the gate, are slices of a wider row as a layer's projection makes
them. Everything is compared with its formula in fp64 before anything is timed. A time is that of
one call inside a captured graph, median and 95th percentile; decode steps take turns over so many
slots that no cache holds them. `floor` is what a copy of the bytes takes at the device's own copy
bandwidth; `host_us` how long a call outside a graph keeps the host.

Peers, where this Python has vLLM 0.18.0: causal_conv1d_fn with its builder's metadata,
causal_conv1d_update (in place), rmsnorm_fn. `--sweep` times ours alone, with every tile.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _gdn_conv_formulas as formulas
from _bench_gdn_decode import copy_bandwidth
from _bench_rope import machine, replay, write_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _gdn_conv_rivals import tiled, vllm

from ascend_patch.kernels.gdn.cases import BATCHES

DEVICE = "cuda"
CHANNELS, WIDTH, HEADS, SIZE = 8192, 4, 32, 128
STEPS = {"1": (1, 1), "32": (32, 1), "256": (256, 1), "32x4": (32, 4)}
ROWS = (1, 32, 256, 2048, 8192, 32768)
# More than twice the second-level cache of any device so far.
FOOTPRINT = 192 << 20
# Of a relative error: vLLM rounds products to bfloat16, and all round their results.
LIMIT = 6e-3
COLUMNS = ("what", "case", "tp", "who", "p50_us", "p95_us", "host_us", "floor_us", "error")


@dataclass
class Bench:
    """One shape: what must be moved, what is right, and who is timed, a call of no arguments each.

    ``reset`` puts the cache back before a check; ``found`` is what was written besides the result.
    """

    what: str
    case: str
    ranks: int
    moved: int
    wanted: Callable[[], list[Any]]
    callers: dict[str, Callable[[], Any]]
    reset: Callable[[], None] = lambda: None
    found: Callable[[], list[Any]] = list
    turns: list[Callable[[], None]] = field(default_factory=list)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench gdn_conv", description=__doc__)
    parser.add_argument("--site", default="", help="a folder with vLLM and what it needs")
    parser.add_argument("--out", type=Path, help="folder for gdn_conv.csv")
    parser.add_argument("--tp", type=int, nargs="*", default=(1, 2, 4, 8))
    parser.add_argument("--what", nargs="*", default=("prefill", "update", "norm"))
    parser.add_argument("--case", nargs="*", default=(), help="names of cases; none is all")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--sweep", action="store_true", help="ours alone, with every tile")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench gdn_conv needs a CUDA device: torch.cuda.is_available() is False.")
        return 1
    from ascend_patch.kernels.gdn import conv_triton, gated_norm_triton

    conv_triton.register()
    gated_norm_triton.register()
    facts = machine(options.commit)
    bandwidth = copy_bandwidth(options.replays)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="")
    print(f"; a copy moves {bandwidth / 1e9:.0f} GB/s")
    print(",".join(COLUMNS))
    peers = None if options.sweep else vllm(options.site)
    rows = []
    for bench in benches(options, peers):
        for row in measure(bench, options, bandwidth):
            print(",".join(str(row[column]) for column in COLUMNS), flush=True)
            rows.append(row)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_csv(options.out / "gdn_conv.csv", rows, facts, COLUMNS)
    return 0


def benches(options: Any, peers: Any) -> Iterator[Bench]:
    for ranks in options.tp:
        for name, lengths in BATCHES.items():
            if "prefill" in options.what and name in (options.case or BATCHES):
                yield prefill(name, lengths, ranks, peers)
        for name, shape in STEPS.items():
            if "update" in options.what and name in (options.case or STEPS):
                yield update(name, *shape, ranks, peers)
        for tokens, sliced in itertools.product(ROWS, (False, True)):
            name = f"{tokens}{' sliced' if sliced else ''}"
            if "norm" in options.what and (not options.case or name in options.case):
                yield norm(name, tokens, sliced, ranks, peers)


def measure(bench: Bench, options: Any, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The rows of one shape; all share the inputs."""
    wanted = bench.wanted()
    floor = round(bench.moved / bandwidth * 1e6, 2)
    callers = (
        tiled(bench.what, bench.callers["ours"]) if options.sweep else iter(bench.callers.items())
    )
    for who, call in callers:
        bench.reset()
        out = call()
        error = max(
            formulas.apart(found, want)
            for found, want in zip([out, *bench.found()], wanted, strict=True)
        )
        if not error < LIMIT:
            raise SystemExit(f"{bench.what} {bench.case} {who} is off by {error:.1e}: not timed.")
        turn = itertools.cycle(bench.turns or [lambda: None])

        def step(call: Callable[[], Any] = call, turn: Iterator[Any] = turn) -> None:
            next(turn)()
            call()

        p50, p95 = replay(step, options.replays)
        row = (bench.what, bench.case, bench.ranks, who, round(p50, 2), round(p95, 2))
        row += (round(held(call), 1), floor, f"{error:.1e}")
        yield dict(zip(COLUMNS, row, strict=True))


def held(call: Callable[[], Any], calls: int = 50) -> float:
    """Microseconds that one call keeps the host; median."""
    import torch

    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * sorted(times)[calls // 2]


def normal(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=DEVICE).bfloat16()


def prefill(name: str, lengths: tuple[int, ...], ranks: int, peers: Any) -> Bench:
    import torch

    from ascend_patch.kernels import gdn

    channels, count = CHANNELS // ranks, len(lengths)
    # A row has the gate's part behind it, as in_proj_qkvz of Qwen3.5 makes it.
    x = normal(sum(lengths), channels * 3 // 2)[:, :channels]
    weight, cache = normal(channels, WIDTH), normal(count + 5, WIDTH - 1, channels)
    before = cache.clone()
    slots = torch.randperm(count + 5, device=DEVICE)[:count].int()
    carried = torch.arange(count, device=DEVICE) % 2 == 0
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    chunks = gdn.build_chunk_metadata(starts, torch.device(DEVICE))
    state, on_device = cache.transpose(1, 2), starts.to(DEVICE)
    shared = {"activation": "silu", "has_initial_state": carried}

    def ours() -> Any:
        return gdn.causal_conv1d(
            x, weight, conv_state=state, state_indices=slots, chunk_metadata=chunks, **shared
        )

    callers = {"ours": ours}
    if peers is not None:
        nums, sequences, parts = peers.metadata(starts, device=torch.device(DEVICE))
        names = {"nums_dict": nums, "batch_ptr": sequences, "token_chunk_offset_ptr": parts}
        given = {"cache_indices": slots, "query_start_loc": on_device, **shared}

        def theirs() -> Any:
            found = peers.prefill(
                x.transpose(0, 1),
                weight,
                None,
                conv_states=state,
                metadata=SimpleNamespace(**names),
                **given,
            )
            return found.transpose(0, 1)

        callers["vllm"] = theirs

    def wanted() -> list[Any]:
        return formulas.prefill(x, weight, before, slots.long(), carried, starts)

    moved = 2 * (2 * x.numel() + count * (WIDTH - 1) * channels * 3 // 2)
    return Bench(
        "prefill", name, ranks, moved, wanted, callers, lambda: cache.copy_(before), lambda: [cache]
    )


def update(name: str, batch: int, tokens: int, ranks: int, peers: Any) -> Bench:
    import torch

    from ascend_patch.kernels import gdn

    channels, places = CHANNELS // ranks, WIDTH - 2 + tokens
    size = places * channels * 2
    turns = max(1, min(32, FOOTPRINT // (batch * size)))
    x, weight = normal(batch * tokens, channels), normal(channels, WIDTH)
    cache = normal(batch * turns, places, channels)
    before, state, kept = cache.clone(), cache.transpose(1, 2), x.clone()
    all_slots = torch.randperm(batch * turns, device=DEVICE).int().view(turns, batch)
    now = SimpleNamespace(slots=all_slots[0])
    many: dict[str, Any] = {}
    if tokens > 1:
        many["num_accepted_tokens"] = torch.arange(batch, device=DEVICE).int() % tokens + 1
        starts = torch.arange(0, batch * tokens + 1, tokens, device=DEVICE)
        many |= {"query_start_loc": starts.int(), "max_query_len": tokens}

    def ours() -> Any:
        return gdn.causal_conv1d_update(
            x, state, weight, activation="silu", state_indices=now.slots, **many
        )

    def in_place() -> Any:
        return gdn.causal_conv1d_update(
            x, state, weight, activation="silu", state_indices=now.slots, out=x, **many
        )

    callers = {"ours": ours, "ours in place": in_place}
    if peers is not None:

        def theirs() -> Any:
            return peers.update(
                x, state, weight, None, "silu", conv_state_indices=now.slots, **many
            )

        callers["vllm"] = theirs

    def reset() -> None:
        cache.copy_(before)
        x.copy_(kept)
        now.slots = all_slots[0]

    def wanted() -> list[Any]:
        accepted = many.get("num_accepted_tokens")
        return formulas.update(kept, weight, before, all_slots[0].long(), tokens, accepted)

    moved = 2 * (2 * x.numel() + batch * channels * (WIDTH - 1 + places))
    choices = [lambda slots=slots: setattr(now, "slots", slots) for slots in all_slots]
    return Bench(
        "update", name, ranks, moved, wanted, callers, reset, lambda: [cache], turns=choices
    )


def norm(name: str, tokens: int, sliced: bool, ranks: int, peers: Any) -> Bench:
    from ascend_patch.kernels import gdn

    heads = HEADS // ranks
    x, weight = normal(tokens, heads, SIZE), normal(SIZE)
    gate = normal(tokens, heads * SIZE * (3 if sliced else 1))[:, : heads * SIZE]
    gate = gate.unflatten(1, (heads, SIZE))

    def ours() -> Any:
        return gdn.gated_rms_norm(x, gate, weight, eps=1e-6)

    callers = {"ours": ours}
    if peers is not None:

        def theirs() -> Any:
            rows = x.reshape(-1, SIZE), gate.reshape(-1, SIZE)
            found = peers.norm(rows[0], weight, None, z=rows[1], eps=1e-6, norm_before_gate=True)
            return found.view(x.shape)

        callers["vllm"] = theirs
    moved = 2 * 3 * x.numel()
    return Bench("norm", name, ranks, moved, lambda: [formulas.norm(x, gate, weight)], callers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Rotary embedding on a CUDA device, side by side with its peers: scripts/bench rope.

Every call is checked against fp64 before anything is timed. A time is that of one call inside a
captured graph: median and 95th percentile of 1000 replays, a replay of many calls where one is
short. Figures of two machines are not comparable; shares of the copy in one run are.

Peers: `compiled` is torch.compile of vLLM's forward_native formulation at a fixed shape; `cuda` a
stand-alone build of the arithmetic and launch shape of vLLM's CUDA kernel (in place, one block a
token, one pair of elements a thread, products rounded to bfloat16); `copy` a device copy of the
bytes that the operator must read and write at least; `empty` a kernel that does nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _pictures import can_draw
from _rope_rivals import CUDA_SOURCE, EMPTY_SOURCE, copy, native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
SHAPES = ((32, 8, 128, 128), (64, 4, 128, 128), (16, 2, 256, 64), (12, 1, 128, 96))
REPLAYS = 1000
ROWS = 32768  # of the cache
COLUMNS = ("q_heads", "k_heads", "head_size", "rotary_dim", "tokens", "what", "p50_us", "p95_us")
COLUMNS += ("bytes", "gb_s", "share_of_copy", "over_empty_us")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench rope", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for rope.csv and the plot")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench rope needs a CUDA device: torch.cuda.is_available() is False here.")
        return 1
    facts = machine(arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(" ".join(f"{column:>13}" for column in COLUMNS))
    pairs = itertools.product(SHAPES, arguments.tokens)
    rows = [row for shape, tokens in pairs for row in measure(shape, tokens)]
    pairs = itertools.product(SHAPES, arguments.tokens)
    rows += [row for shape, tokens in pairs for row in measure_fused(shape, tokens)]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / "rope.csv", rows, facts)
        plot(arguments.out / "rope.png", rows, facts)
    return 0


def machine(commit: str) -> dict[str, str]:
    import torch
    import triton

    if not commit:
        call = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(call, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def inputs(shape: tuple[int, ...], tokens: int) -> tuple[Any, ...]:
    """(positions, query, key, cache): query and key are slices of one random qkv tensor."""
    import torch

    from ascend_patch.kernels.rope import cases

    q_heads, k_heads, head_size, _ = shape
    case = cases.RopeCase(1, *shape, max_position=ROWS, cache_dtype="bfloat16")
    cache = cases.make_cache(case, "cuda")
    width = (q_heads + 2 * k_heads) * head_size
    qkv = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    query, key = qkv[:, : q_heads * head_size], qkv[:, q_heads * head_size :]
    positions = torch.randint(0, ROWS, (tokens,), device="cuda")
    return positions, query, key[:, : k_heads * head_size], cache


def check(
    name: str, got: Any, x: Any, positions: Any, cache: Any, head_size: int, roundings: int
) -> None:
    """Compare with the rotation in complex fp64; `roundings` to bfloat16 are forgiven."""
    import torch

    half = cache.shape[1] // 2
    for part in torch.arange(x.shape[0], device=x.device).split(4096):
        phase = torch.complex(*cache[positions[part]].double().split(half, dim=1))
        heads = x[part].double().unflatten(1, (-1, head_size))
        found = got[part].double().unflatten(1, (-1, head_size))
        z = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * phase[:, None]
        want = torch.cat((z.real, z.imag, heads[..., 2 * half :]), dim=-1)
        pair = heads[..., :half].abs() + heads[..., half : 2 * half].abs()
        weight = torch.cat((pair, pair, heads[..., 2 * half :] * 0), dim=-1)
        # The last rounding errs by half a unit of the result, those before by one of the products.
        allowed = want.abs() * 2.0**-8 * 1.01 + weight * (2.0**-21 + (roundings - 1) * 2.0**-8)
        bad = ((found - want).abs() > allowed).sum().item()
        if bad or not found.isfinite().all():
            raise SystemExit(f"{name} is wrong in {bad} elements: nothing was timed.")


def measure(shape: tuple[int, ...], tokens: int) -> list[dict[str, Any]]:
    """The rows of one head shape and one number of tokens; peers share the inputs."""
    import torch

    from ascend_patch.kernels import rope

    q_heads, k_heads, head_size, rotary_dim = shape
    call = positions, query, key, cache = inputs(shape, tokens)
    options: dict[str, Any] = {"head_size": head_size, "is_neox_style": True}
    torch._dynamo.reset()
    compiled = torch.compile(native(head_size), dynamic=False)
    kernel = torch.cuda._compile_kernel(CUDA_SOURCE, "rope")
    empty = torch.cuda._compile_kernel(EMPTY_SOURCE, "empty")
    block = (min(q_heads * rotary_dim // 2, 512), 1, 1)
    counts = (rotary_dim // 2, query.stride(0), q_heads, k_heads, head_size)

    def ours_in_place(q: Any, k: Any) -> None:
        rope.rotary_embedding_(positions, q, k, cache, **options)

    def cuda(q: Any, k: Any) -> None:
        kernel((tokens, 1, 1), block, (positions, q, k, cache, *counts))

    got = {"ours": rope.rotary_embedding(*call, **options), "compiled": compiled(*call)}
    twins = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in call[1:3]
    ]
    for name, run in (("ours in place", ours_in_place), ("cuda", cuda)):
        q, k = (twin.copy_(x) for twin, x in zip(twins, (query, key), strict=True))
        run(q, k)
        got[name] = q.clone(), k.clone()
    for name, pair in got.items():
        for found, x in zip(pair, (query, key), strict=True):
            roundings = 1 if name.startswith("ours") else 3
            check(name, found, x, positions, cache, head_size, roundings)
    del got
    whole = torch.randn(tokens * (q_heads + k_heads) * head_size, device="cuda").bfloat16()
    turned = whole[: tokens * (q_heads + k_heads) * rotary_dim]
    target = torch.empty_like(whole)
    size, part = 4 * whole.numel(), 4 * turned.numel()
    variants: dict[str, tuple[Callable[[], Any], int]] = {
        "empty": (lambda: empty((1, 1, 1), (32, 1, 1), ()), 0),
        "copy": (lambda: copy(target, whole), size),
        "ours": (lambda: rope.rotary_embedding(*call, **options), size),
        "compiled": (lambda: compiled(*call), size),
        "copy in place": (lambda: copy(target[: turned.numel()], turned), part),
        "ours in place": (lambda: ours_in_place(*twins), part),
        "cuda": (lambda: cuda(*twins), part),
    }
    times = {name: replay(run) for name, (run, _) in variants.items()}
    rows = []
    for name, (p50, p95) in times.items():
        moved = variants[name][1]
        base = times["copy in place" if name in ("ours in place", "cuda") else "copy"][0]
        row = (*shape, tokens, name, round(p50, 3), round(p95, 3), moved)
        row += (round(moved / p50 / 1e3, 1), round(base / p50, 3) if moved else "")
        row += (round(p50 - times["empty"][0], 3),)
        print(" ".join(f"{value!s:>13}" for value in row), flush=True)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def replay(run: Callable[[], Any], replays: int = REPLAYS) -> tuple[float, float]:
    """(p50, p95) of one call in microseconds: many calls in a graph where one is short."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(10):
            run()
        last.record()
        stream.synchronize()
        calls = max(1, min(32, int(3000 / max(100 * first.elapsed_time(last), 1))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for begin, end in events:
            begin.record()
            graph.replay()
            end.record()
        stream.synchronize()
    times = sorted(1e3 * begin.elapsed_time(end) / calls for begin, end in events)
    return times[len(times) // 2], times[len(times) * 95 // 100]


def measure_fused(shape: tuple[int, ...], tokens: int) -> list[dict[str, Any]]:
    """The rows of split_qkv_rmsnorm_rope: ours, torch.compile of its reference, and a copy."""
    import torch

    from ascend_patch.kernels import rope
    from ascend_patch.kernels.rope import fused_reference

    q_heads, k_heads, head_size, _ = shape
    positions, query, _, cache = inputs(shape, tokens)
    qkv = query._base
    q_weight, k_weight = torch.randn(2, head_size, device="cuda").bfloat16()
    heads = {"num_q_heads": q_heads, "num_kv_heads": k_heads, "head_size": head_size}

    def ours() -> Any:
        call = qkv, positions, cache, q_weight, k_weight
        return rope.split_qkv_rmsnorm_rope(*call, **heads, eps=1e-6)

    def formula(qkv: Any, positions: Any) -> Any:
        sizes = (q_heads, k_heads, k_heads)
        out = tuple(qkv.new_empty(qkv.shape[0], n * head_size) for n in sizes)
        rest = (q_weight, k_weight, None, None, *heads.values(), 1e-6, True, None, False, 0.0)
        fused_reference.split_qkv_rmsnorm_rope_into(*out, None, qkv, positions, cache, *rest)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(formula, dynamic=False)
    for got, want in zip(ours(), formula(qkv, positions), strict=True):
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-5)
    target = torch.empty_like(qkv)
    variants = {"copy": lambda: copy(target, qkv), "fused ours": ours}
    variants["fused compiled"] = lambda: compiled(qkv, positions)
    times = {name: replay(run) for name, run in variants.items()}
    moved, base, rows = 4 * qkv.numel(), times["copy"][0], []
    for name, (p50, p95) in list(times.items())[1:]:
        row = (*shape, tokens, name, round(p50, 3), round(p95, 3), moved)
        row += (round(moved / p50 / 1e3, 1), round(base / p50, 3), "")
        print(" ".join(f"{value!s:>13}" for value in row), flush=True)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def write_csv(
    path: Path,
    rows: list[dict[str, Any]],
    facts: dict[str, str],
    columns: tuple[str, ...] = COLUMNS,
) -> None:
    """A line a row, each with what it was measured on."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def plot(path: Path, rows: list[dict[str, Any]], facts: dict[str, str]) -> None:
    """Time over tokens, a panel for each head shape; needs matplotlib, says so if it is missing."""
    if not can_draw():
        return
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(4.2 * len(SHAPES), 4), sharey=True)
    for panel, shape in zip(panels, SHAPES, strict=True):
        here = [r for r in rows if tuple(r[c] for c in COLUMNS[:4]) == shape]
        for what in dict.fromkeys(r["what"] for r in here):
            points = [(r["tokens"], r["p50_us"]) for r in here if r["what"] == what]
            style = "--" if what.startswith(("copy", "empty")) else "-"
            panel.plot(*zip(*points, strict=True), style, marker=".", label=what)
        panel.set(
            xscale="log", yscale="log", xlabel="tokens", title="heads {}:{} D{} r{}".format(*shape)
        )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("us a call (p50 of 1000 graph replays)")
    panels[0].legend()
    figure.suptitle("rotary_embedding: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

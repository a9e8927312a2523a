"""Time the variants of the Triton kernels: the figures in kernels/rope/tiles.py come from this.

    python docs/bench/rope_sweep.py [--only rotary|fused|angles] TOKENS...

Needs a CUDA device; measures as scripts/bench rope does, 100 replays each. A variant is compared
with what the table's gives before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from _bench_rope import SHAPES, inputs, replay

WARPS = (1, 2, 4, 8)
HEADS = (4, 8, 16, 32, 64)


def variants(
    plan: Any, heads: tuple[int, int], tokens: int, other: str | None
) -> Iterator[tuple[str, Any, int]]:
    """(name, plan, warps): tile sizes, warps, split or not, and the ``other`` kernel."""
    from ascend_patch.kernels.rope import tiles

    kinds = ["", other] if other else [""]
    # A program a tile for a long prefill is slower by far: not timed again.
    splits = (True, False) if tokens <= 4096 else (False,)
    for most, warps, split, kind in itertools.product(HEADS, WARPS, splits, kinds):
        tile = [tiles.head_tile(n, most) for n in heads]
        if most > 2 * max(tile) or (kind == "early" and not split):
            continue
        trial = replace(plan, query_tile=tile[0], key_tile=tile[1], split=split, early=False)
        if kind == "early":
            trial = tiles.early_tile(trial)
        used = (trial.query_tile, trial.key_tile)
        yield f"{used} warps {warps} split {int(split)} {kind}".rstrip(), trial, warps


def compare(
    title: str,
    module: Any,
    tokens: int,
    call: tuple[Any, ...],
    results: int,
    run: Callable[..., Any],
    heads: tuple[int, int],
    other: str | None,
) -> None:
    """Print the six best variants of one call, the best of each kernel, and the table's."""
    import torch

    from ascend_patch.kernels.rope import tiles

    plan = module.plan_of(tokens, *call)
    run(*call)
    wanted = [out.clone() for out in call[:results]]
    found: list[tuple[float, float, str]] = []
    for name, trial, warps in variants(plan, heads, tokens, other):
        values, constants = module.arguments(tokens, trial, *call)
        kernel = module.kernel_of(trial)[tiles.grid(trial, tokens, *heads)]

        def launch(k: Any = kernel, v: Any = values, c: Any = constants, w: int = warps) -> None:
            k(*v, **c, num_warps=w)

        for out in call[:results]:
            out.fill_(float("nan"))
        launch()
        for out, want in zip(call[:results], wanted, strict=True):
            torch.testing.assert_close(out, want, rtol=2.0**-7, atol=1e-5)
        found.append((*replay(launch, 100), name))
    found.sort()
    print(title, tokens, *(f"{p50:.2f} us {name};" for p50, _, name in found[:6]), flush=True)
    best = next(((p50, name) for p50, _, name in found if other and name.endswith(other)), None)
    if best:
        print(f"   the best {other}: {best[0]:.2f} us {best[1]}")
    mine = replay(lambda: run(*call), 100)
    print(f"   the table's: {mine[0]:.2f} us, p95 {mine[1]:.2f} us", flush=True)


def sweep(token_counts: list[int]) -> None:
    """rotary_embedding, functional and in place."""
    from ascend_patch.kernels.rope import triton_call

    for shape, tokens in itertools.product(SHAPES, token_counts):
        positions, query, key, cache = inputs(shape, tokens)
        out = query.contiguous(), key.contiguous()
        call = (*out, positions, query, key, cache, shape[2], True, None, False)
        run = triton_call.rotary_embedding_into
        compare(f"{shape}", triton_call, tokens, call, 2, run, shape[:2], "early")


def sweep_fused(token_counts: list[int]) -> None:
    """split_qkv_rmsnorm_rope."""
    import torch

    from ascend_patch.kernels.rope import fused_call

    for shape, tokens in itertools.product(SHAPES, token_counts):
        positions, query, _, cache = inputs(shape, tokens)
        q_heads, k_heads, size, _ = shape
        out = [query.new_empty(tokens, n * size) for n in (q_heads, k_heads, k_heads)]
        weight = torch.ones(size, device="cuda")
        call = (*out, None, query._base, positions, cache, weight, weight, None, None)
        call += (q_heads, k_heads, size, 1e-6, True, None, False, 0.0)
        run = fused_call.split_qkv_rmsnorm_rope_into
        compare(f"fused {shape}", fused_call, tokens, call, 3, run, shape[:2], None)


def sweep_angles(token_counts: list[int]) -> None:
    """apply_rotary, heads of a vision tower: q and k of one image, (heads, head size)."""
    import torch

    from ascend_patch.kernels.rope import angles_call

    for (heads, size), places in itertools.product(((16, 80), (16, 72)), token_counts):
        x = torch.randn(2, places, heads, size, device="cuda", dtype=torch.bfloat16)
        angles = torch.randn(places, size // 2, device="cuda")
        call = (torch.empty_like(x), x, angles.cos(), angles.sin(), True)
        plan, run = angles_call.plan_of(2 * places, *call), angles_call.apply_rotary_into
        print(f"angles {heads, size} tile {plan.query_tile}", 2 * places, end=" ")
        mine = replay(lambda c=call, r=run: r(*c), 100)
        copied = replay(lambda c=call: c[0].copy_(c[1]), 100)
        print(f"the table's: {mine[0]:.2f} us; a copy: {copied[0]:.2f} us", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("rotary", "fused", "angles"))
    parser.add_argument("tokens", type=int, nargs="+")
    arguments = parser.parse_args()
    parts = {"rotary": sweep, "fused": sweep_fused, "angles": sweep_angles}
    for part in [parts[arguments.only]] if arguments.only else parts.values():
        part(arguments.tokens)

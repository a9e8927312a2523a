"""Time the variants of the Triton kernels: the figures in kernels/rope/tiles.py come from this.

    python docs/bench/rope_sweep.py TOKENS...

Needs a CUDA device; measures as scripts/bench rope does, 100 replays each.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from _bench_rope import SHAPES, inputs, replay


def sweep(token_counts: Any) -> None:
    """Time our kernel's variants; the figures in kernels/rope/tiles.py come from this."""
    from ascend_patch.kernels.rope import tiles, triton_call
    from ascend_patch.kernels.rope.triton_kernel import rotary_kernel

    for shape, tokens in itertools.product(SHAPES, token_counts):
        positions, query, key, cache = inputs(shape, tokens)
        out = query.contiguous(), key.contiguous()
        call = (*out, positions, query, key, cache, shape[2], True, None, False)
        plan = triton_call.plan_of(tokens, *call)
        found: list[tuple[float, str]] = []
        for most, warps, split in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8), (1, 0)):
            heads = [tiles.head_tile(n, most) for n in shape[:2]]
            if most > 2 * max(heads):
                continue
            trial = replace(
                plan, query_tile=heads[0], key_tile=heads[1], num_warps=warps, split=bool(split)
            )
            values, constants = triton_call.arguments(tokens, trial, *call)
            grid = tiles.grid(trial, tokens, *shape[:2])

            def run(g: Any = grid, v: Any = values, c: Any = constants, w: int = warps) -> None:
                rotary_kernel[g](*v, **c, num_warps=w)

            found.append((replay(run, 100)[0], f"{heads} warps {warps} split {split}"))
        found.sort()
        print(shape, tokens, *(f"{p50:.2f} us {what};" for p50, what in found[:6]), flush=True)
        mine = replay(lambda c=call: triton_call.rotary_embedding_into(*c), 100)
        print(f"   the table's: {mine[0]:.2f} us", flush=True)


def sweep_fused(token_counts: Any) -> None:
    """The same for split_qkv_rmsnorm_rope."""
    import torch

    from ascend_patch.kernels.rope import fused_call, tiles
    from ascend_patch.kernels.rope.fused_kernel import fused_kernel

    for shape, tokens in itertools.product(SHAPES, token_counts):
        positions, query, _, cache = inputs(shape, tokens)
        q_heads, k_heads, size, _ = shape
        out = [query.new_empty(tokens, n * size) for n in (q_heads, k_heads, k_heads)]
        weight = torch.ones(size, device="cuda")
        call = (*out, None, query._base, positions, cache, weight, weight, None, None)
        call += (q_heads, k_heads, size, 1e-6, True, None, False, 0.0)
        found: list[tuple[float, str]] = []
        for most, warps, split in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8), (1, 0)):
            heads = [tiles.head_tile(n, most) for n in shape[:2]]
            if most > 2 * max(heads):
                continue
            trial = replace(
                fused_call.plan_of(tokens, *call),
                query_tile=heads[0],
                key_tile=heads[1],
                num_warps=warps,
                split=bool(split),
            )
            values, constants = fused_call.arguments(tokens, trial, *call)
            grid = tiles.grid(trial, tokens, *shape[:2])

            def run(g: Any = grid, v: Any = values, c: Any = constants, w: int = warps) -> None:
                fused_kernel[g](*v, **c, num_warps=w)

            found.append((replay(run, 100)[0], f"{heads} warps {warps} split {split}"))
        found.sort()
        print("fused", shape, tokens, *(f"{p50:.2f} us {what};" for p50, what in found[:6]))
        mine = replay(lambda c=call: fused_call.split_qkv_rmsnorm_rope_into(*c), 100)
        print(f"   the table's: {mine[0]:.2f} us", flush=True)


if __name__ == "__main__":
    sweep([int(argument) for argument in sys.argv[1:]])
    sweep_fused([int(argument) for argument in sys.argv[1:]])

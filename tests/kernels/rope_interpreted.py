"""Judge the Triton kernel under Triton's interpreter, on CPU; run by test_rope_interpreter.py.

    python tests/kernels/rope_interpreted.py VARIANT         # the spread of cases.py
    python tests/kernels/rope_interpreted.py product SEED    # every pair of factors, any variant

TRITON_INTERPRET=1 has to be set before triton is imported, so this is a process of its own. Prints
a JSON object: the id of each case, and what was wrong with it or "".
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace

import angles_judge
import fused_judge
import product
from rope_judge import run_and_judge

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.rope import (
    angles_call,
    angles_cases,
    cases,
    fused_call,
    fused_cases,
    tiles,
    triton_call,
)

SEED = 1
# A small batch is split by heads, a program takes a token, a program loops: each with few tokens.
# "split" is early_kernel's for q and k; "other" gives that to rotary_kernel.
VARIANTS = ("split", "token", "loops", "ascend", "other")


def interpreted_cases() -> list[cases.RopeCase]:
    """A spread of the grid and of MRoPE, with few tokens: each element costs microseconds."""
    grid = cases.correctness_cases()[::4] + cases.mrope_cases()[::3]
    spread = [replace(case, tokens=min(case.tokens, 3)) for case in grid]
    return [replace(case, query_heads=12) if case.query_heads > 32 else case for case in spread]


def interpreted_fused_cases() -> list[fused_cases.FusedCase]:
    found = []
    for case in fused_cases.fused_cases()[::2]:
        shape = replace(case.rope, tokens=min(case.rope.tokens, 3))
        found.append(replace(case, rope=replace(shape, query_heads=min(shape.query_heads, 12))))
    return found


def interpreted_angles_cases() -> list[angles_cases.AnglesCase]:
    spread = angles_cases.angles_cases()[::2]
    return [replace(c, places=min(c.places, 3), heads=min(c.heads, 12)) for c in spread]


_GRID = tiles.grid
_PLANS = {module: module.plan_of for module in (triton_call, fused_call, angles_call)}


def force(variant: str) -> None:
    """Have the launch take this variant's tiles, whatever the number of tokens."""
    tokens = {"split": 1, "token": 1000, "loops": 1000, "other": 1000}

    def plan(module, ascend_tiles):
        def forced(_tokens, *call):
            if variant == "ascend":
                return ascend_tiles(*call)
            if variant == "other" and module is triton_call:
                return replace(_PLANS[module](1, *call), early=False)
            return replace(_PLANS[module](tokens[variant], *call), loops=variant == "loops")

        module.plan_of = forced

    def rotary(*call):
        heads = (call[3].shape[1] // call[6], 0 if call[4] is None else call[4].shape[1] // call[6])
        sizes = (*heads, call[6], call[5].shape[1], call[3].element_size())
        return tiles.ascend_tiles(*sizes, call[7])

    def fused(*call):
        rotary_dim, itemsize = call[6].shape[1], call[4].element_size()
        return tiles.fused_ascend_tiles(*call[11:14], rotary_dim, itemsize, call[15])

    def angles(_out, x, cos, _sin, style):
        sizes = (x.shape[-2], 0, x.shape[-1], 2 * cos.shape[-1], x.itemsize)
        return tiles.ascend_tiles(*sizes, style)

    plan(triton_call, rotary)
    plan(fused_call, fused)
    plan(angles_call, angles)
    tiles.grid = _GRID
    if variant in ("loops", "ascend"):
        # Two programs for three tokens: one of them takes two.
        tiles.grid = lambda plan, tokens, q, k, _cores: _GRID(plan, tokens, q, k, 2)


def spread_of(variant: str) -> list[tuple]:
    """(id, variant, judge, case, seed) of what one variant is tested with."""
    calls = [(case, run_and_judge) for case in interpreted_cases()]
    calls += [(case, fused_judge.run_and_judge) for case in interpreted_fused_cases()]
    calls += [(case, angles_judge.run_and_judge) for case in interpreted_angles_cases()]
    mine = calls[VARIANTS.index(variant) :: len(VARIANTS)]
    # More than 256 tokens with 64 and 4 heads: where a racy read of positions was once seen.
    crowd = cases.RopeCase(257, 64, 4, 64, 64, max_position=4096)
    mine.append((fused_cases.FusedCase(crowd), fused_judge.run_and_judge))
    return [(str(case), variant, judge, case, SEED) for case, judge in mine]


def product_of(seed: int) -> list[tuple]:
    """The same for covering samples; a thousand tokens and more are left to compiled kernels."""
    found = []
    for factors, make, judge in (
        (product.ROTARY, product.rotary_case, run_and_judge),
        (product.FUSED, product.fused_case, fused_judge.run_and_judge),
        (product.ANGLES, product.angles_case, angles_judge.run_and_judge),
    ):
        few = {**factors, "variant": VARIANTS}
        for name in ("tokens", "places"):
            if name in few:
                few[name] = (0, 1, 3, 17)
        if "counts" in few:
            few["counts"] = ((1, 1), (12, 1), (6, 2), (64, 4), (16, 16))
        for n, case in enumerate(product.covering(few, seed)):
            title = f"{n} {case['variant']} {make(case)}"
            found.append((title, case["variant"], judge, make(case), seed + n))
    return found


def main(mode: str, seed: str = "0") -> None:
    for operator, module in (
        ("rotary_embedding", triton_call),
        ("split_qkv_rmsnorm_rope", fused_call),
        ("apply_rotary", angles_call),
    ):
        run = getattr(module, f"{operator}_into")
        kernel = dispatch.Implementation("triton", run, module.supports, 10)
        dispatch.register(operator, "cpu", kernel)
    found = {}
    for title, variant, judge, case, case_seed in (
        product_of(int(seed)) if mode == "product" else spread_of(mode)
    ):
        force(variant)
        try:
            judge(case, case_seed)
            found[title] = ""
        except Exception:
            found[title] = traceback.format_exc(limit=-3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

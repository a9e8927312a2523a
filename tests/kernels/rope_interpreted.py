"""Judge the Triton kernel under Triton's interpreter, on CPU; run by test_rope_interpreter.py.

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
VARIANTS = ("split", "token", "loops", "ascend")


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


def force(variant: str) -> None:
    """Have the launch take this variant's tiles, whatever the number of tokens."""
    tokens = {"split": 1, "token": 1000, "loops": 1000}
    plan_of = triton_call.plan_of

    def forced(_tokens, *call):
        if variant != "ascend":
            return replace(plan_of(tokens[variant], *call), loops=variant == "loops")
        heads = (call[3].shape[1] // call[6], 0 if call[4] is None else call[4].shape[1] // call[6])
        rotary_dim, itemsize = call[5].shape[1], call[3].element_size()
        return tiles.ascend_tiles(*heads, call[6], rotary_dim, itemsize, call[7])

    fused_plan_of = fused_call.plan_of

    def fused_forced(_tokens, *call):
        if variant != "ascend":
            return replace(fused_plan_of(tokens[variant], *call), loops=variant == "loops")
        rotary_dim, itemsize = call[6].shape[1], call[4].element_size()
        return tiles.fused_ascend_tiles(*call[11:14], rotary_dim, itemsize, call[15])

    angles_plan_of = angles_call.plan_of

    def angles_forced(_tokens, *call):
        if variant != "ascend":
            return replace(angles_plan_of(tokens[variant], *call), loops=variant == "loops")
        _, x, cos, _, style = call
        rotary_dim = 2 * cos.shape[-1]
        return tiles.ascend_tiles(x.shape[-2], 0, x.shape[-1], rotary_dim, x.itemsize, style)

    triton_call.plan_of, fused_call.plan_of = forced, fused_forced
    angles_call.plan_of = angles_forced
    if variant in ("loops", "ascend"):
        # Two programs for three tokens: one of them takes two.
        grid = tiles.grid
        tiles.grid = lambda plan, tokens, q, k, _cores: grid(plan, tokens, q, k, 2)


def main() -> None:
    force(sys.argv[1])
    call = triton_call.rotary_embedding_into
    kernel = dispatch.Implementation("triton", call, triton_call.supports, 10)
    dispatch.register("rotary_embedding", "cpu", kernel)
    offset = VARIANTS.index(sys.argv[1])
    call = fused_call.split_qkv_rmsnorm_rope_into
    fused = dispatch.Implementation("triton", call, fused_call.supports, 10)
    dispatch.register("split_qkv_rmsnorm_rope", "cpu", fused)
    angles = dispatch.Implementation(
        "triton", angles_call.apply_rotary_into, angles_call.supports, 10
    )
    dispatch.register("apply_rotary", "cpu", angles)
    found = {}
    calls = [(case, run_and_judge) for case in interpreted_cases()]
    calls += [(case, fused_judge.run_and_judge) for case in interpreted_fused_cases()]
    calls += [(case, angles_judge.run_and_judge) for case in interpreted_angles_cases()]
    for case, judge in calls[offset :: len(VARIANTS)]:
        try:
            judge(case, SEED)
            found[str(case)] = ""
        except Exception:
            found[str(case)] = traceback.format_exc(limit=-3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Run by test_gdn_norm.py: the gated norm's kernel on CPU tensors, interpreted.

Prints each case's error as JSON, as a share of what is allowed.
"""

from __future__ import annotations

import json
import sys

from gdn_norm_judge import NormCase, judge_norm

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import gated_norm, gated_norm_triton

CASES = (
    NormCase((70, 128)),
    NormCase((33, 96), before=False, dtype="float16", weight_dtype="float32"),
    NormCase((5, 3, 48), sliced=True, given=True),
    NormCase((5, 4, 128), sliced=True, before=False, dtype="bfloat16"),
    NormCase((9, 24), group=8, gate=False),
    NormCase((4, 3, 40), group=20, sliced=True, before=False),
    NormCase((7,), dtype="float16", scale=300.0),
    NormCase((3, 0, 8)),
)


def few(call: gated_norm.Call) -> None:
    """Three programs go over all tiles, as on an NPU with so many cores."""
    from ascend_patch.kernels.gdn.gated_norm_kernel import gated_norm_kernel

    values, constants = gated_norm_triton.arguments(call, gated_norm_triton.Tiles(4))
    if values[gated_norm_triton.ITEMS]:
        gated_norm_kernel[3,](*values, **constants)


if __name__ == "__main__":
    found: dict = {}
    for kind, run in (("cuda", gated_norm_triton.run), ("npu", few)):
        offer = dispatch.Implementation("triton", run, gated_norm_triton.supports, 9)
        dispatch.register(gated_norm.OPERATOR, "cpu", offer)
        with dispatch.only("triton"):
            found[kind] = {
                str(case): judge_norm(
                    case, int(sys.argv[1]), cut=2 if case.dtype == "bfloat16" else 1
                )
                for case in CASES
            }
    print(json.dumps(found))

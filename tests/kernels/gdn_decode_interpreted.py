"""Run by test_gdn_recurrent_triton.py: the decode kernels on CPU tensors, interpreted.

Prints each case's errors as JSON.
"""

from __future__ import annotations

import json
import sys

from gdn_decode_gates import gates_in_fp64, make_gates, worst
from gdn_decode_judge import judge_decode
from gdn_decode_oracle import DecodeCase

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import gating_triton, recurrent, recurrent_triton

SIZES = {"key_heads": 1, "value_heads": 2}
GROUPS = {"key_heads": 2, "value_heads": 4}
RAGGED = (1, 3, 0, 2)
CASES = (
    DecodeCase(2, dtype="bfloat16", state_dtype="bfloat16", sliced=True, padded=(1,), **GROUPS),
    DecodeCase(2, layout="KV", raw=False, dtype="float16", **SIZES),
    DecodeCase(lengths=RAGGED, width=3, sliced=True, tail=1, rows=1, **SIZES),
    DecodeCase(lengths=RAGGED, width=2, layout="KV", accepted=False, padded=(0,), **SIZES),
    DecodeCase(lengths=RAGGED, layout="KV", normalise=False, raw=False, **SIZES),
    DecodeCase(1, key_size=256, value_size=64, scale=0.5, normalise=False, **SIZES),
    DecodeCase(1, key_size=64, value_size=256, layout="KV", decay=20.0, raw=False, **SIZES),
    DecodeCase(0, **SIZES),
)
GATES = ((5, 12), (1, 32), (70, 3), (0, 4))


def run(**arguments: object) -> object:
    with dispatch.only(recurrent_triton.NAME):
        return gdn.recurrent_gated_delta_rule(**arguments)


def run_as_npu(call: recurrent.RecurrentCall) -> None:
    """Three programs, each taking part after part: as on an NPU with so many cores."""
    from ascend_patch.kernels.gdn.recurrent_kernel import recurrent_kernel

    tiles = recurrent_triton.tiles(call, "npu")
    values, constants = recurrent_triton.arguments(call, tiles, "npu")
    recurrent_kernel[3,](*values, **constants)


def judge_gates(shape: tuple[int, int], seed: int) -> float:
    given = make_gates(*shape, "bfloat16", seed)
    with dispatch.only(gating_triton.NAME):
        return worst(gdn.fused_gating(**given), gates_in_fp64(**given))


if __name__ == "__main__":
    gating_triton.register("cpu")
    seed = int(sys.argv[1])
    found: dict = {"gates": {str(shape): judge_gates(shape, seed) for shape in GATES}}
    for kind, runs in (("cuda", recurrent_triton.run), ("npu", run_as_npu)):
        offer = dispatch.Implementation(recurrent_triton.NAME, runs, recurrent_triton.supports, 9)
        dispatch.register(recurrent.OPERATOR, "cpu", offer)
        found[kind] = {str(case): judge_decode(case, seed, run=run) for case in CASES}
    print(json.dumps(found))

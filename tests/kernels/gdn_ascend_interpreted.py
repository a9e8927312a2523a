"""Run by test_gdn_ascend.py: the kernels in Ascend's form on CPU tensors, under the interpreter.

Of the two half types only float16: numpy, which stands behind the interpreter's products, has no
bfloat16. Three programs loop. Prints each case's errors as JSON.
"""

from __future__ import annotations

import json
import sys

import gdn_judge
from gdn_oracle import Case

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import chunk, chunk_ascend

CORES = 3
CASES = (
    Case((1, 63, 0, 64, 65, 130), dtype="float16"),
    Case((65, 0, 3), dtype="float16", layout="KV", states="cache", tail=3, key_heads=1),
    Case((70, 64), dtype="float16", layout="VK", states="cache", sliced=True, value_heads=2),
    Case((130,), dtype="float16", same_keys=True, decay=1e-4, value_heads=2, states="none"),
    Case((65,), dtype="float16", decay=20.0, value_heads=2, normalise=False),
    Case((0, 0), dtype="float16"),
)


def run(call: chunk.Call) -> None:
    for kernel, programs, values, constants in chunk_ascend.launches(call, CORES):
        kernel[(programs,)](*values, **constants)


def only_the_kernels(**arguments: object) -> object:
    with dispatch.only(chunk_ascend.NAME):
        return gdn.chunk_gated_delta_rule(**arguments)


if __name__ == "__main__":
    kernels = dispatch.Implementation(chunk_ascend.NAME, run, chunk_ascend.supports, 1)
    dispatch.register(chunk.OPERATOR, "cpu", kernels)
    seed = int(sys.argv[1])
    found = {str(case): gdn_judge.judge(case, seed, run=only_the_kernels) for case in CASES}
    print(json.dumps(found))

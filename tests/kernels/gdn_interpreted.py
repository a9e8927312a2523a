"""Run by test_gdn_triton.py: the Triton kernels on CPU tensors, under Triton's interpreter.

Of the two half types only float16: numpy, which stands behind the interpreter's products, has no
bfloat16. Prints each case's errors as JSON.
"""

from __future__ import annotations

import json
import sys

import gdn_judge
from gdn_oracle import Case

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import chunk, chunk_fused, chunk_triton

CASES = (
    Case((1, 63, 0, 64, 65, 130), dtype="float16"),
    Case((65, 0, 3), dtype="float16", layout="KV", states="cache", tail=3, key_heads=1),
    Case((70, 64), dtype="float16", layout="VK", states="cache", sliced=True, value_heads=2),
    Case((130,), dtype="float16", same_keys=True, decay=1e-4, value_heads=2, states="none"),
    Case((65,), dtype="float16", decay=20.0, value_heads=2, normalise=False),
    Case((0, 0), dtype="float16"),
)


FORMS = {chunk_triton.NAME: chunk_triton.run, chunk_fused.NAME: chunk_fused.run}


def judged(form: str, case: Case, seed: int) -> tuple[float, float]:
    def run(**arguments: object) -> object:
        with dispatch.only(form):
            return gdn.chunk_gated_delta_rule(**arguments)

    return gdn_judge.judge(case, seed, run=run)


if __name__ == "__main__":
    for form, kernels in FORMS.items():
        offer = dispatch.Implementation(form, kernels, chunk_triton.supports, 1)
        dispatch.register(chunk.OPERATOR, "cpu", offer)
    seed = int(sys.argv[1])
    found = {f"{form} {case}": judged(form, case, seed) for form in FORMS for case in CASES}
    print(json.dumps(found))

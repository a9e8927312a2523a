"""Breaks the rotary kernel on demand, in a running server: what a comparison must notice.

A vLLM plugin (this folder goes on PYTHONPATH), so it reaches every worker and the shim knows
nothing of it. It stands in front of the implementation that the shim has registered and reads
the file named in E2E_FAULT_FILE at each call: "sine" negates the sines, "factor" scales what comes
out, anything else changes nothing. Operator bodies run as Python in compiled graphs too.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

OPERATOR = "rotary_embedding"
FACTOR = 1.25


def install() -> None:
    file = os.environ.get("E2E_FAULT_FILE")
    if not file:
        return
    from ascend_patch.kernels import dispatch
    from ascend_patch.kernels.rope import ops

    real = next(i for i in dispatch.candidates(ops.OPERATOR, "cpu") if i.name == "reference")

    def run(out_query, out_key, positions, query, key, cos_sin_cache, *rest):
        fault = read(Path(file))
        if fault == "sine":
            cos, sin = cos_sin_cache.chunk(2, dim=-1)
            cos_sin_cache = cos.new_empty(cos_sin_cache.shape).copy_(cos_sin_cache)
            cos_sin_cache.chunk(2, dim=-1)[1].copy_(-sin)
        elif fault == "factor":
            cos_sin_cache = cos_sin_cache * FACTOR
        real.run(out_query, out_key, positions, query, key, cos_sin_cache, *rest)

    # One with the same name takes its predecessor's place.
    dispatch.register(ops.OPERATOR, dispatch.ANY_DEVICE, dataclasses.replace(real, run=run))


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

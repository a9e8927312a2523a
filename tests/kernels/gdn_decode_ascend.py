"""Run by test_gdn_recurrent_ascend.py: the decode kernels compiled for Ascend, executed on x86.

    python gdn_decode_ascend.py compile [PART]  # bytes of unified buffer; PART of a case's name
    python gdn_decode_ascend.py execute SEED    # relative errors, for each case

Prints JSON. The interpreter is one with triton-ascend: see ascend_offline.py.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import ascend_offline
import ascend_store
from gdn_decode_gates import gates_in_fp64, make_gates, worst
from gdn_decode_judge import judge_decode
from gdn_decode_oracle import DecodeCase, make_decode

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import gating, gating_triton, recurrent, recurrent_triton

HERE = Path(__file__).resolve().parent
SOURCES = [
    HERE / "ascend_offline.py",
    *HERE.glob("gdn_decode_*.py"),
    *(HERE.parents[1] / "kernels" / "gdn").glob("gating*.py"),
    *(HERE.parents[1] / "kernels" / "gdn").glob("recurrent*.py"),
]
# Fewer than an NPU has, so that each takes several parts.
CORES = 3
HEADS = {"key_heads": 16, "value_heads": 32, "sliced": True}
FEW = {"key_heads": 2, "value_heads": 4}
GATES = ((70, 4), (70, 12), (70, 32), (70, 64))
EXECUTED = (
    DecodeCase(2, sliced=True, padded=(1,), **FEW),
    DecodeCase(2, layout="KV", raw=False, **FEW),
    DecodeCase(lengths=(1, 3, 0, 2), width=3, sliced=True, tail=1, rows=1, **FEW),
    DecodeCase(lengths=(1, 3, 0, 2), width=2, layout="KV", accepted=False, padded=(0,), **FEW),
    DecodeCase(lengths=(1, 0, 2), layout="KV", normalise=False, raw=False, **FEW),
    DecodeCase(1, dtype="float16", state_dtype="float16", key_size=128, **FEW),
)


def compiled_cases() -> list[DecodeCase]:
    """Both layouts and kinds of states, plain and speculative, sizes alike and not."""
    sizes = ((128, 128), (256, 256), (64, 256), (256, 64))
    every = itertools.product(("VK", "KV"), ("bfloat16", "float32"), (None, (3, 3)), sizes)
    return [
        DecodeCase(
            2,
            lengths=lengths,
            width=3 if lengths else 0,
            layout=layout,
            dtype="bfloat16",
            state_dtype=state,
            key_size=key_size,
            value_size=value_size,
            **HEADS,
        )
        for layout, state, lengths, (key_size, value_size) in every
    ]


def compile_step(call: recurrent.RecurrentCall) -> tuple[Any, Any, tuple[Any, ...], int]:
    """(kernel, compiled, values, parts)."""
    from ascend_patch.kernels.gdn.recurrent_kernel import recurrent_kernel

    tiles = recurrent_triton.tiles(call, "npu")
    values, constants = recurrent_triton.arguments(call, tiles, "npu")
    compiled = ascend_offline.compile_kernel(recurrent_kernel, values, constants)
    parts = recurrent_triton.item_count(call, tiles)
    return recurrent_kernel, compiled, values, parts


def compile_gates(call: gating.GatingCall) -> tuple[Any, Any, tuple[Any, ...], int]:
    from ascend_patch.kernels.gdn.gating_kernel import gating_kernel

    values, constants = gating_triton.arguments(call, "npu")
    compiled = ascend_offline.compile_kernel(gating_kernel, values, constants)
    return gating_kernel, compiled, values, -(-call.a.shape[0] // constants["ROWS"])


def offer(
    operator: str, module: Any, compiles: Any, tools: Path | None, buffers: list[int]
) -> None:
    """Have calls compiled and their unified buffer noted; with ``tools`` executed too."""

    def run(call: Any) -> None:
        kernel, compiled, values, parts = compiles(call)
        buffers.append(ascend_offline.unified_buffer(compiled))
        if tools:
            library = ascend_offline.build(compiled, tools)
            ascend_offline.execute(library, kernel, (min(parts, CORES), 1, 1), values)

    implementation = dispatch.Implementation(module.NAME, run, module.supports, 9)
    dispatch.register(operator, "cpu", implementation)


def buffers_of_cases(part: str) -> dict[str, int]:
    found: list[int] = []
    offer_all(None, found)
    for shape in GATES:
        gdn.fused_gating(**make_gates(*shape, "bfloat16", 0))
    cases = [case for case in compiled_cases() if part in str(case)]
    for case in cases:
        gdn.recurrent_gated_delta_rule(**make_decode(case, 0).arguments)
    names = [*(f"gates {shape}" for shape in GATES), *map(str, cases)]
    return dict(zip(names, found, strict=True))


def errors_of_cases(tools: Path, seed: int) -> dict[str, float]:
    offer_all(tools, [])
    found = {}
    for shape in GATES:
        given = make_gates(*shape, "float32", seed)
        found[f"gates {shape}"] = worst(gdn.fused_gating(**given), gates_in_fp64(**given))
    return found | {str(case): max(judge_decode(case, seed)) for case in EXECUTED}


def offer_all(tools: Path | None, buffers: list[int]) -> None:
    offer(recurrent.OPERATOR, recurrent_triton, compile_step, tools, buffers)
    offer(gating.OPERATOR, gating_triton, compile_gates, tools, buffers)


def main(mode: str, argument: str = "") -> None:
    tools, versions = ascend_offline.activate(), ascend_offline.versions()
    with dispatch.only(recurrent_triton.NAME):
        if mode == "execute":
            found: Any = errors_of_cases(tools, int(argument))
        else:
            sources = ascend_store.digest_of_files(set(SOURCES))
            key = ascend_store.digest(sources, versions, ascend_offline.ARCHITECTURE, argument)
            found = ascend_store.remember(key, lambda: buffers_of_cases(argument))
    print(json.dumps({"versions": versions, "rows": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

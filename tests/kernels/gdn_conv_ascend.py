"""Run by test_gdn_conv_ascend.py: convolutions and norm compiled for Ascend, executed on x86.

    python gdn_conv_ascend.py compile [PART]  # bytes of unified buffer; PART of a case's name
    python gdn_conv_ascend.py execute SEED    # errors as shares of what is allowed
    python gdn_conv_ascend.py count           # bytes through global memory, and the least

Prints JSON. The interpreter is one with triton-ascend: see ascend_offline.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import ascend_offline
import ascend_store
from gdn_conv_judge import judge_conv
from gdn_conv_oracle import ConvCase, make_conv
from gdn_norm_judge import NormCase, judge_norm, make_norm

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import conv, conv_tiles, conv_triton, gated_norm, gated_norm_triton

HERE = Path(__file__).resolve().parent
SOURCES = [
    HERE / "ascend_offline.py",
    *HERE.glob("gdn_conv_*.py"),
    *HERE.glob("gdn_norm_*.py"),
    *(HERE.parents[1] / "kernels" / "gdn").glob("conv*.py"),
    *(HERE.parents[1] / "kernels" / "gdn").glob("gated_norm*.py"),
]
# Fewer than an NPU has, so that each takes several parts.
CORES = 3
RAGGED = (1, 0, 2, 64, 66, 3)
EXECUTED = (
    *(ConvCase(RAGGED, width=width, places=width + 1, padded=(5,)) for width in (2, 3, 4, 5)),
    ConvCase(RAGGED, channels=1100, sliced=True, tail=2, bias=False, dtype="float16"),
    ConvCase(RAGGED, table=False, tail=70, given=True, padded=(3,), cache="gaps", columns=True),
    ConvCase(RAGGED, cache="none", silu=False),
)
STEPPED = (
    *(ConvCase((1,) * 7, width=width, plain=True, places=6) for width in (2, 3, 4, 5)),
    ConvCase((1,) * 7, plain=True, padded=(0, 3), channels=1100, dtype="float16"),
    ConvCase((3, 0, 1, 2), places=6, accepted=(1, 2, 3, 1), tail=1, padded=(3,)),
    ConvCase((1, 0, 3, 2, 7), padded=(3,), tail=2, given=True, bias=False),
)
NORMS = (
    NormCase((70, 128)),
    NormCase((5, 3, 48), sliced=True, given=True),
    NormCase((9, 24), group=8, gate=False),
    NormCase((33, 96), before=False, dtype="float16", weight_dtype="float32"),
)
# What a call of Qwen3-Next's widths moves, on one rank and on one of eight.
COUNTED = (
    ("prefill", ConvCase((300, 20), channels=8192, dtype="float16", bias=False)),
    ("prefill", ConvCase((300, 20), channels=1024, dtype="float16", bias=False)),
    ("update", ConvCase((1,) * 8, channels=8192, dtype="float16", bias=False, plain=True)),
    ("norm", NormCase((40, 32, 128), dtype="float16", sliced=True)),
)


def compiled_cases() -> list[tuple[str, Any]]:
    """Dtypes, widths and kinds of steps, with channels of one rank and with odd ones."""
    shared = {"sliced": True, "places": 7}
    every = product(("bfloat16", "float32"), (2, 3, 4, 5), (8192, 1000))
    found: list[tuple[str, Any]] = []
    for dtype, width, channels in every:
        case = {"dtype": dtype, "width": width, "channels": channels, **shared}
        found.append(("prefill", ConvCase((65, 3), **case)))
        found.append(("prefill", ConvCase((65, 3), **case, table=False)))
        found.append(("update", ConvCase((1, 1), **case, plain=True)))
        found.append(("update", ConvCase((3, 2), **case, accepted=(1, 2))))
    mixed = {"dtype": "bfloat16", "weight_dtype": "float32", "state_dtype": "float32"}
    found.append(("prefill", ConvCase((65, 3), channels=8192, **mixed, **shared)))
    found.append(("update", ConvCase((3, 2), channels=8192, accepted=(1, 2), **mixed, **shared)))
    sizes = (((70, 32, 128), None), ((70, 4096), None), ((70, 2048), 256), ((70, 3, 96), None))
    for dtype, (shape, group), before in product(("bfloat16", "float32"), sizes, (True, False)):
        found.append(("norm", NormCase(shape, group, dtype, before=before)))
    return found


def prefill(call: conv.Call) -> tuple[Any, Any, Any, int]:
    """(kernel, values, constants, programs) as on an NPU of few cores."""
    from ascend_patch.kernels.gdn.conv_kernel import conv_kernel

    channels = call.x.shape[1]
    tiles = conv_tiles.prefill_tiles(channels, call.x.element_size(), "npu")
    values, constants = conv_triton.arguments(call, tiles, "npu")
    cores = max(CORES, -(-channels // tiles.channels))
    items = values[conv_triton.CHUNKS]
    return conv_kernel, values, constants, conv_tiles.programs(items, channels, tiles, cores)


def update(call: conv.UpdateCall) -> tuple[Any, Any, Any, int]:
    from ascend_patch.kernels.gdn.conv_update_kernel import conv_update_kernel

    channels = call.x.shape[1]
    tiles = conv_tiles.update_tiles(channels, call.x.element_size(), "npu")
    values, constants = conv_triton.update_arguments(call, tiles, "npu")
    cores = max(CORES, -(-channels // tiles.channels))
    programs = conv_tiles.programs(call.sequences, channels, tiles, cores)
    return conv_update_kernel, values, constants, programs


def norm(call: gated_norm.Call) -> tuple[Any, Any, Any, int]:
    from ascend_patch.kernels.gdn.gated_norm_kernel import gated_norm_kernel

    layout = gated_norm_triton._layout(call)
    assert layout is not None
    tiles = gated_norm_triton.tiles_of(*layout[:2], call.group, "npu")
    values, constants = gated_norm_triton.arguments(call, tiles)
    return gated_norm_kernel, values, constants, min(values[gated_norm_triton.ITEMS], CORES)


OPERATORS = (
    (conv.OPERATOR, prefill, conv_triton),
    (conv.UPDATE, update, conv_triton),
    (gated_norm.OPERATOR, norm, gated_norm_triton),
)


def offer(tools: Path | None, notes: list[Any]) -> None:
    """Have calls compiled and their unified buffer noted; with ``tools`` executed, bytes noted."""
    for operator, make, module in OPERATORS:

        def run(call: Any, make: Callable[..., Any] = make) -> None:
            kernel, values, constants, programs = make(call)
            compiled = ascend_offline.compile_kernel(kernel, values, constants)
            if tools is None:
                notes.append(ascend_offline.unified_buffer(compiled))
                return
            library = ascend_offline.build(compiled, tools)
            notes.append(ascend_offline.execute(library, kernel, (programs, 1, 1), values))

        offered = dispatch.Implementation(module.NAME, run, module.supports, 9)
        dispatch.register(operator, "cpu", offered)


def call_of(kind: str, case: Any, seed: int = 0) -> Any:
    if kind == "norm":
        return gdn.gated_rms_norm(**make_norm(case, seed))
    arguments = make_conv(case, seed, update=kind == "update").arguments
    function = gdn.causal_conv1d_update if kind == "update" else gdn.causal_conv1d
    return function(**arguments)


def buffers(part: str) -> dict[str, int]:
    notes: list[int] = []
    offer(None, notes)
    cases = [(kind, case) for kind, case in compiled_cases() if part in f"{kind} {case}"]
    for kind, case in cases:
        call_of(kind, case)
    return dict(zip((f"{kind} {case}" for kind, case in cases), notes, strict=True))


def shares(tools: Path, seed: int) -> dict[str, float]:
    offer(tools, [])
    found = {f"prefill {case}": judge_conv(case, seed) for case in EXECUTED}
    found |= {f"update {case}": judge_conv(case, seed, update=True) for case in STEPPED}
    return found | {f"norm {case}": judge_norm(case, seed) for case in NORMS}


def counts(tools: Path) -> dict[str, dict[str, int]]:
    notes: list[tuple[int, int]] = []
    offer(tools, notes)
    found = {}
    for kind, case in COUNTED:
        call_of(kind, case)
        read, written = notes.pop()
        found[f"{kind} {case}"] = {"read": read, "written": written, "least": least(kind, case)}
    return found


def least(kind: str, case: Any) -> int:
    """Bytes that must move: x and the result, the weights once, each state read and written."""
    if kind == "norm":
        tokens, heads, size = case.shape
        return 2 * (3 * tokens * heads * size + size)
    states = 2 * len(case.lengths) * (case.width - 1)
    return 2 * case.channels * (2 * sum(case.lengths) + case.width + states)


def main(mode: str, argument: str = "") -> None:
    tools, versions = ascend_offline.activate(), ascend_offline.versions()
    with dispatch.only(conv_triton.NAME):
        if mode == "execute":
            found: Any = shares(tools, int(argument))
        elif mode == "count":
            found = counts(tools)
        else:
            sources = ascend_store.digest_of_files(set(SOURCES))
            key = ascend_store.digest(sources, versions, ascend_offline.ARCHITECTURE, argument)
            found = ascend_store.remember(key, lambda: buffers(argument))
    print(json.dumps({"versions": versions, "rows": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The merge kernel compiled for Ascend, and executed on x86 as it is lowered; no NPU takes part.

    python tests/kernels/kv_ascend.py table     # a row for each case
    python tests/kernels/kv_ascend.py write     # the same into docs/ascend/kv.csv
    python tests/kernels/kv_ascend.py execute   # bytes that are wrong, for each case

The interpreter is one with triton-ascend: see ascend_offline.py.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ascend_offline
import kv_compiled
import kv_judge

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.kv_layout import merge, merge_triton
from ascend_patch.kernels.kv_layout.cases import CASES, MergeCase
from ascend_patch.kernels.kv_layout.merge_kernel import merge_kernel

TABLE = Path(__file__).resolve().parents[2] / "docs" / "ascend" / "kv.csv"
CORES = 3


def compiled(prepared: merge_triton.Launch) -> Any:
    """What the compiler made of a launch."""
    return ascend_offline.compile_kernel(merge_kernel, prepared.values, prepared.constants)


def row(case: MergeCase) -> dict[str, object]:
    """Buffer that was planned and foreseen, bytes of a request moved, how much at a time."""
    call = kv_compiled.call_of(case)
    prepared = merge_triton.prepare(call, on_npu=True)
    item = prepared.values[0].element_size()
    made = compiled(prepared)
    return {
        "buffer": ascend_offline.unified_buffer(made),
        "foreseen": merge_triton.ascend_buffer_bytes(prepared),
        "launches": 1,
        "tasks": prepared.tasks,
        "bytes_at_a_time": prepared.constants["COLUMNS"] * item,
        "waits": waits(made),
    }


def waits(made: Any) -> bool:
    """Does the unit that writes wait for the one that reads, between a tile's read and write?"""
    text = made.asm["npubin"]
    text = text.decode() if isinstance(text, bytes) else text
    calls = [text.index(f"call @{name}") for name in ("load_gm_to_ubuf", "store_ubuf_to_gm")]
    assert text.count("call @load_gm_to_ubuf") == text.count("call @store_ubuf_to_gm") == 1
    return "wait_flag[<PIPE_MTE2>, <PIPE_MTE3>" in text[calls[0] : calls[1]]


class Runner:
    """merge_head_shards_ as the lowered kernel; counts what goes through global memory."""

    def __init__(self, tools: Path) -> None:
        self.tools, self.moved = tools, (0, 0)

    def __call__(self, call: merge.MergeCall) -> None:
        for part in merge_triton.by_width(call):
            prepared = merge_triton.prepare(part, on_npu=True)
            library = ascend_offline.build(compiled(prepared), self.tools)
            run = (library, merge_kernel, (CORES, 1, 1), prepared.values)
            found = ascend_offline.execute(*run)
            self.moved = self.moved[0] + found[0], self.moved[1] + found[1]


def executed(case: MergeCase, tools: Path) -> dict[str, int]:
    """Wrong bytes; bytes read and written, and how many there are to move."""
    case = replace(case, blocks=2, layers=1)
    runner = Runner(tools)
    kernel = dispatch.Implementation("lowered", runner, priority=1)
    dispatch.register(merge.OPERATOR, "cpu", kernel)
    with dispatch.only("lowered"):
        wrong = kv_judge.wrong_bytes(case, 7)
    read, written = runner.moved
    return {"wrong": wrong, "read": read, "written": written, "least": case.total_bytes}


def rows(tools: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for case in CASES:
        counts = executed(case, tools)
        yield str(case), {**row(case), **counts}


def main(mode: str) -> None:
    tools = ascend_offline.activate()
    if mode == "execute":
        found = {str(case): executed(case, tools) for case in CASES}
    elif mode == "compile":
        found = {str(case): row(case) for case in CASES}
    else:
        found = dict(rows(tools))
    if mode == "write":
        with TABLE.open("w", newline="") as file:
            names = ["case", *next(iter(found.values())), "compiler"]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            for case, values in found.items():
                writer.writerow({"case": case, **values, "compiler": ascend_offline.versions()})
    print(json.dumps({"versions": ascend_offline.versions(), "rows": found}))


if __name__ == "__main__":
    main(sys.argv[1])

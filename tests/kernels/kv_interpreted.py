"""Run by test_kv_merge.py: the merge kernel on CPU tensors, under Triton's interpreter.

Programs run one after another there, so that one that writes where another has yet to read shows.
Prints for each case how many bytes were wrong, as JSON: in the form for GPUs, in that for Ascend,
and, with the argument `open`, of groups of rows that are not closed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import kv_judge
import torch

from ascend_patch.kernels import dispatch, kv_layout
from ascend_patch.kernels.kv_layout import cases, merge, merge_tiles, merge_triton

SMALL = tuple(replace(case, blocks=2, layers=1) for case in (*cases.CASES, *cases.UNEVEN))


def on_gpu(call: merge.MergeCall) -> None:
    for part in merge_triton.by_width(call):
        merge_triton.launch(merge_triton.prepare(part), torch.device("cpu"))


def on_ascend(call: merge.MergeCall) -> None:
    ok, reason = merge_triton._supports_on_npu(call)
    assert ok, reason
    for part in merge_triton.by_width(call):
        merge_triton.launch(merge_triton.prepare(part, on_npu=True), torch.device("cpu"), cores=3)


def judge(run, which: tuple[cases.MergeCase, ...], seed: int) -> dict[str, int]:
    dispatch.register(merge.OPERATOR, "cpu", dispatch.Implementation("kernel", run, priority=1))
    with dispatch.only("kernel"):
        return {str(case): kv_judge.wrong_bytes(case, seed) for case in which}


if __name__ == "__main__":
    seed = int(sys.argv[1])
    if "open" in sys.argv:
        closed = merge_tiles.row_groups
        merge_tiles.row_groups = lambda *given: closed(*given[:3], False)
    found = {"gpu": judge(on_gpu, SMALL, seed)}
    if "open" not in sys.argv:
        even = tuple(
            case for case in SMALL if not set(cases.UNEVEN) & {replace(case, blocks=5, layers=2)}
        )
        found["ascend"] = judge(on_ascend, even, seed)
    assert kv_layout.merge_head_shards_ is merge.merge_head_shards_
    print(json.dumps(found))

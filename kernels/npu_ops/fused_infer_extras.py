"""The documented limits of int8 keys and of learnable sinks of fused inference attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem
from ascend_patch.kernels.npu_ops.settings import allowed


def check(problem: Problem) -> None:
    """Raise OperatorError for the first limit that the call breaks."""
    _check_quantisation(problem)
    _check_sink(problem)


def _check_quantisation(problem: Problem) -> None:
    scales = (problem.key_scale, problem.value_scale)
    offsets = (problem.key_offset, problem.value_offset)
    v1 = not problem.newer
    names = ("key_antiquant", "value_antiquant") if v1 else ("key_quant", "value_quant")
    if (problem.key.dtype == torch.int8) != (scales[0] is not None):
        raise problem.error(
            f"key is {problem.key.dtype} and its scale is "
            f"{'missing' if scales[0] is None else 'given'}; int8 keys, and only they, have scales"
        )
    for what, pair in (("scale", scales), ("offset", offsets)):
        if (pair[0] is None) != (pair[1] is None):
            raise problem.error(f"the {what}s of key and value must both be given, or neither")
    if scales[0] is None:
        return
    if not problem.single:
        raise problem.error("int8 keys and values need Q_S = 1 in a layout that is not TND")
    if problem.key_mode != 0 or problem.value_mode != 0:
        raise problem.error(
            f"{names[0]}_mode={problem.key_mode} and {names[1]}_mode={problem.value_mode} are not "
            "emulated; only 0, per channel, is"
        )
    for name, x in zip(("key", "value") * 2, (*scales, *offsets), strict=True):
        if x is not None:
            _check_channels(problem, name, x)


def _check_channels(problem: Problem, name: str, x: Tensor) -> None:
    kv_heads, width = problem.kv_heads, problem.query_width
    shapes: list[tuple[int, ...]] = [
        (1, kv_heads, 1, width), (1, kv_heads, width), (1, kv_heads * width), (1,)
    ]  # fmt: skip
    if problem.newer:
        shapes += [(kv_heads, 1, width), (kv_heads, width), (kv_heads * width,)]
    if tuple(x.shape) not in shapes:
        raise problem.error(
            f"a scale or offset of {name} has shape {tuple(x.shape)}; per channel it must be "
            f"{shapes[0]}, {shapes[1]} or {shapes[2]}"
        )
    takes = {problem.query.dtype}
    if problem.query.dtype == torch.float32:
        # Under the allowance only: hosts round their scales to bfloat16 whatever the model is.
        takes.add(torch.bfloat16)
    if x.dtype not in takes:
        raise problem.error(
            f"a scale or offset of {name} is {x.dtype}; it must be {problem.query.dtype}, "
            "as the query"
        )


def _check_sink(problem: Problem) -> None:
    sink = problem.sink
    if sink is None:
        return
    takes = (torch.bfloat16, torch.float32) if allowed("float32") else (torch.bfloat16,)
    if sink.dtype not in takes:
        raise problem.error(f"learnable_sink is {sink.dtype}; it must be bfloat16")
    if tuple(sink.shape) != (problem.heads,):
        raise problem.error(
            f"learnable_sink has shape {tuple(sink.shape)}; it must be ({problem.heads},)"
        )
    if not problem.ragged:
        raise problem.error(f"learnable_sink with input_layout={problem.layout!r}; use 'TND'")
    if problem.value_width > 128:
        raise problem.error(
            f"learnable_sink with values of head size {problem.value_width}; 128 is the most"
        )

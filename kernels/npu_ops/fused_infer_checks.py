"""The documented limits of fused inference attention on Atlas A2 and A3.

From torch_npu's documentation of both versions. What CANN's tiling code refuses beyond that is
said to be CANN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import (
    fused_infer_extras,
    fused_infer_lists,
    fused_infer_mask,
    fused_infer_paged,
)
from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.fused_infer_problem import Problem
from ascend_patch.kernels.npu_ops.settings import allowed, cann_at_least

_MOST_HEADS = 256
_MOST_GROUP = 64
_MOST_BATCH = 65536
_WIDEST_HEAD = 512
_LONGEST_DECODE = 262144
# Head sizes of query and value in TND that are in use without being documented.
_TOLERATED = ((64, 64), (256, 256))
# Value head sizes for which TND takes a band.
_BANDED = (64, 128)


def check(problem: Problem) -> None:
    """Raise OperatorError for the first limit that the call breaks."""
    _check_others(problem)
    _check_dtypes(problem)
    _check_shapes(problem)
    if not problem.query.numel():
        # The operator returns at once.
        return
    _check_heads(problem)
    if problem.paged:
        fused_infer_paged.check_block_size(problem)
    fused_infer_lists.check(problem)
    if problem.paged:
        fused_infer_paged.check(problem)
    else:
        _check_dense(problem)
    _check_head_size(problem)
    _check_contiguity(problem)
    fused_infer_mask.check(problem)
    _check_precision(problem)
    fused_infer_extras.check(problem)


def check_out(operator: str, found: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Raise OperatorError unless ``out`` is [attention_out, softmax_lse] as large as ``found``."""
    if len(out) != 2:
        raise OperatorError(
            f"{operator}: out has {len(out)} tensors; it must be [attention_out, softmax_lse]"
        )
    for name, target, source in zip(("attention_out", "softmax_lse"), out, found, strict=True):
        if target.numel() != source.numel():
            raise OperatorError(
                f"{operator}: out's {name} has shape {tuple(target.shape)}; "
                f"it must have room for {tuple(source.shape)}"
            )
    if out[0].dtype != found[0].dtype:
        raise OperatorError(
            f"{operator}: out's attention_out is {out[0].dtype}; it must be {found[0].dtype}, "
            "as the query"
        )


def _check_others(problem: Problem) -> None:
    for name, value in problem.others.items():
        if isinstance(value, (Tensor, Sequence)) or value:
            raise problem.error(f"{name} is not emulated; leave it at its default")


def _check_dtypes(problem: Problem) -> None:
    query, key, value = problem.query, problem.key, problem.value
    takes = (torch.float16, torch.bfloat16) + ((torch.float32,) if allowed("float32") else ())
    if query.dtype not in takes:
        raise problem.error(f"query is {query.dtype}; it must be float16 or bfloat16")
    half = problem.ragged and query.dtype == torch.float16
    if half and not cann_at_least("9.0") and not allowed("tnd_float16"):
        raise problem.error(f"query is torch.float16 in {problem.layout}; it must be bfloat16")
    if value.dtype != key.dtype:
        raise problem.error(f"value is {value.dtype} and key is {key.dtype}; they must be the same")
    if key.dtype not in (query.dtype, torch.int8):
        raise problem.error(f"key is {key.dtype}; it must be {query.dtype}, as the query, or int8")


def _check_shapes(problem: Problem) -> None:
    letters, layout = problem.letters, problem.layout
    if problem.query.dim() != len(letters):
        raise problem.error(
            f"query has shape {tuple(problem.query.shape)}; input_layout={layout!r} needs "
            f"({', '.join(letters)})"
        )
    if layout == "BNSD_BSND" and problem.query_rows == 1:
        raise problem.error("input_layout='BNSD_BSND' needs Q_S > 1; use 'BNSD' or 'BSND'")
    if problem.paged:
        return
    for name, x in (("key", problem.key), ("value", problem.value)):
        if x.dim() != len(letters):
            raise problem.error(
                f"{name} has shape {tuple(x.shape)}; input_layout={layout!r} needs "
                f"({', '.join(letters)}) with KV_N heads"
            )


def _check_heads(problem: Problem) -> None:
    heads, kv_heads = problem.heads, problem.kv_heads
    kv_name = "num_key_value_heads"
    for name, number in ((problem.heads_name, heads), (kv_name, kv_heads)):
        if not 0 < number <= _MOST_HEADS:
            raise problem.error(f"{name}={number}; it must be 1..{_MOST_HEADS}")
    if heads % kv_heads:
        raise problem.error(
            f"{problem.heads_name}={heads} is no multiple of {kv_name}={kv_heads}; it must be"
        )
    if heads // kv_heads > _MOST_GROUP:
        raise problem.error(
            f"{problem.heads_name}={heads} is {heads // kv_heads} times {kv_name}={kv_heads}; "
            f"at most {_MOST_GROUP} query heads may share a key/value head"
        )
    places = [("query", problem.query, heads, problem.heads_name)]
    if not problem.paged:
        places += [(n, getattr(problem, n), kv_heads, kv_name) for n in ("key", "value")]
    for name, x, number, argument in places:
        if "N" in problem.letters:
            found = x.shape[problem.letters.index("N")]
            if found != number:
                raise problem.error(f"{name} has {found} heads; {argument} says {number}")
        elif x.shape[-1] % number:
            raise problem.error(f"{name} has H={x.shape[-1]}, no multiple of {argument}={number}")


def _check_dense(problem: Problem) -> None:
    query, key, value = problem.query, problem.key, problem.value
    # The heads are known to fit; a ragged value may be narrower than its key.
    same = slice(0, -1) if problem.ragged else slice(None)
    if key.shape[same] != value.shape[same]:
        raise problem.error(
            f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}; "
            "they must be the same"
        )
    if not problem.ragged and key.shape[0] != query.shape[0]:
        raise problem.error(
            f"key has a batch of {key.shape[0]} and query of {query.shape[0]}; "
            "they must be the same"
        )
    if problem.key_width != problem.query_width:
        raise problem.error(
            f"key has head size {problem.key_width} and query {problem.query_width}; "
            "they must be the same"
        )
    if not problem.ragged:
        if query.shape[0] > _MOST_BATCH:
            raise problem.error(f"the batch is {query.shape[0]}; at most {_MOST_BATCH} fit")
        columns = key.shape[problem.letters.index("S")]
        if problem.single and columns > _LONGEST_DECODE:
            raise problem.error(
                f"KV_S is {columns}; with Q_S = 1 it may be {_LONGEST_DECODE} at most"
            )


def _check_head_size(problem: Problem) -> None:
    width, value_width = problem.query_width, problem.value_width
    if problem.ragged:
        _check_ragged_head_size(problem, width, value_width)
        return
    if width > _WIDEST_HEAD:
        raise problem.error(f"the head size is {width}; it may be {_WIDEST_HEAD} at most")
    # 16 bytes of float16; the second version's documentation counts 16 elements.
    multiple = 32 if problem.key.dtype == torch.int8 else 16 if problem.newer else 8
    if width % multiple:
        raise problem.error(
            f"the head size is {width}; for {problem.key.dtype} keys it must be a multiple of "
            f"{multiple}"
        )
    if width % 16 and not problem.single and problem.batch > 128:
        raise problem.error(
            f"the batch is {problem.batch}; with head size {width}, which is not aligned to 32 "
            "bytes, it may be 128 at most"
        )


def _check_ragged_head_size(problem: Problem, width: int, value_width: int) -> None:
    multi_head = problem.heads == problem.kv_heads
    documented = {(128, 128), (192, 128)}
    if problem.layout == "TND" and not (problem.newer and (problem.paged or not multi_head)):
        documented.add((192, 192))
    if problem.newer and multi_head:
        documented.add((64, 64))
    sizes = (width, value_width)
    if sizes not in documented and not (allowed("tnd_head_size") and sizes in _TOLERATED):
        listed = ", ".join(
            str(d) if d == v else f"{d} with values of {v}" for d, v in sorted(documented)
        )
        raise problem.error(
            f"head size {width} with values of {value_width} in {problem.layout}; "
            f"it must be {listed}"
        )
    # From here on: what CANN's own checks add to the documentation.
    if problem.sparse_mode == 4 and value_width not in _BANDED:
        raise problem.error(
            f"sparse_mode=4 with values of head size {value_width} in {problem.layout}; it takes "
            "64 and 128 there: use another layout, or sparse_mode=3 where the window hides nothing"
        )
    if width == 256:
        _check_widest(problem, multi_head)


def _check_widest(problem: Problem, multi_head: bool) -> None:
    """256 is served by one of the operator's paths only, that of grouped queries."""
    if multi_head:
        raise problem.error(
            f"head size 256 in {problem.layout} with as many key/value heads as query heads; "
            "it takes grouped queries only: use another layout"
        )
    if problem.sparse_mode not in (0, 3) or problem.sink is not None or problem.inner_precise:
        raise problem.error(
            f"head size 256 in {problem.layout} with sparse_mode={problem.sparse_mode}, "
            f"inner_precise={problem.inner_precise}"
            f"{', learnable_sink' if problem.sink is not None else ''}; it takes sparse modes 0 "
            "and 3, inner_precise=0 and no sink"
        )
    if problem.paged and (problem.block_size != 128 or problem.heads_first):
        raise problem.error(
            f"head size 256 in {problem.layout} with a cache of shape {tuple(problem.key.shape)}; "
            "it takes (blocks, 128, KV_N * D) only"
        )


def _check_contiguity(problem: Problem) -> None:
    if not problem.query.is_contiguous():
        raise problem.error("query is not contiguous; call .contiguous() on it")
    for name, x in (("key", problem.key), ("value", problem.value)):
        if x.is_contiguous():
            continue
        if problem.newer and cann_at_least("9.1"):
            raise problem.error(f"{name} is not contiguous; from CANN 9.1 it must be")
        if problem.paged or not allowed("strided_kv"):
            raise problem.error(f"{name} is not contiguous; call .contiguous() on it")


def _check_precision(problem: Problem) -> None:
    most = 1 if problem.single else 3
    if not 0 <= problem.inner_precise <= most:
        raise problem.error(f"inner_precise={problem.inner_precise}; it must be 0..{most}")
    if problem.newer and problem.ragged and problem.heads == problem.kv_heads:
        most = 0 if problem.query.dtype == torch.bfloat16 else 1
        if problem.inner_precise > most:
            raise problem.error(
                f"inner_precise={problem.inner_precise} in {problem.layout} with as many key/value "
                f"heads as query heads; for {problem.query.dtype} it must be 0..{most}"
            )

"""The documented limits of npu_fusion_attention on Atlas A2 and A3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import masks, schemas
from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.settings import cann_at_least, current

NAME = "npu_fusion_attention"
_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
_MODES = (0, 1, 2, 3, 4)
_MOST_HEADS = 256
_WIDEST_HEAD = 768
_MOST_SEQUENCES = 2048
_MOST_TOKENS = 1 << 20


def error(sentence: str) -> OperatorError:
    """An OperatorError in the operator's name."""
    return OperatorError(f"{NAME}: {sentence}")


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    layout: str,
    mask: Tensor | None,
    keep_prob: float,
    pre_tokens: int,
    next_tokens: int,
    inner_precise: int,
    query_ends: Sequence[int] | None,
    kv_ends: Sequence[int] | None,
    mode: int,
    softmax_layout: str,
    sink: Tensor | None,
    others: dict[str, Any],
) -> int:
    """The number of key/value heads; raises OperatorError for the first limit that is broken."""
    for name, given in others.items():
        if given is not None:
            raise error(f"{name} is not emulated; leave it out")
    if keep_prob != 1.0:
        raise error(f"keep_prob={keep_prob} is not emulated; it must be 1")
    if layout not in _LAYOUTS:
        raise error(f"input_layout={layout!r}; it must be one of {', '.join(_LAYOUTS)}")
    if inner_precise not in (0, 1, 2):
        raise error(f"inner_precise={inner_precise}; it must be 0, 1 or 2")
    if softmax_layout not in ("", "TND") or (softmax_layout and layout != "TND"):
        raise error(f"softmax_layout={softmax_layout!r}; 'TND' goes with input_layout='TND' only")
    _check_dtypes(query, key, value)
    kv_heads = _check_shapes(query, key, value, heads, layout)
    if layout == "TND":
        _check_ends(query, key, query_ends, kv_ends)
    _check_mask(query, key, heads, layout, mask, mode, pre_tokens, next_tokens)
    _check_sink(sink, heads)
    return kv_heads


def check_rows(index: int, hidden: Tensor | None) -> None:
    """In TND no row of a mask in full may hide everything; ``index`` is the sequence's."""
    if hidden is not None and bool(hidden.all(-1).any()):
        row = int(hidden.all(-1).nonzero()[0][-1])
        raise error(
            f"atten_mask hides every key of row {row} of sequence {index}; "
            "in TND each row must see one"
        )


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise error(f"query is {query.dtype}; it must be float16, bfloat16 or float32")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise error(f"{name} is {x.dtype} and query is {query.dtype}; they must be the same")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str) -> int:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != len(layout):
            raise error(
                f"{name} has shape {tuple(x.shape)}; input_layout={layout!r} needs "
                f"({', '.join(layout)})"
            )
    if not 0 < heads <= _MOST_HEADS:
        raise error(f"head_num={heads}; it must be 1..{_MOST_HEADS}")
    if key.shape[:-1] != value.shape[:-1]:
        raise error(
            f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}; "
            "they must be the same but for the head size"
        )
    if "N" in layout:
        place = layout.index("N")
        if query.shape[place] != heads:
            raise error(f"query has {query.shape[place]} heads; head_num says {heads}")
        kv_heads, width, key_width = key.shape[place], query.shape[-1], key.shape[-1]
        value_width = value.shape[-1]
    else:
        if query.shape[-1] % heads:
            raise error(f"query has H={query.shape[-1]}, no multiple of head_num={heads}")
        width = query.shape[-1] // heads
        if not width or key.shape[-1] % width:
            raise error(f"key has H={key.shape[-1]}, no multiple of the head size {width}")
        kv_heads, key_width = key.shape[-1] // width, width
        if value.shape[-1] % kv_heads:
            raise error(f"value has H={value.shape[-1]}, no multiple of {kv_heads} heads")
        value_width = value.shape[-1] // kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise error(f"query has {heads} heads, no multiple of key's {kv_heads}")
    if width != key_width or value_width > key_width:
        raise error(
            f"head sizes are {width} (query), {key_width} (key), {value_width} (value); query's "
            "and key's must be the same and value's no larger"
        )
    if not 1 <= width <= _WIDEST_HEAD:
        raise error(f"the head size is {width}; it must be 1..{_WIDEST_HEAD}")
    if "B" in layout and query.shape[layout.index("B")] != key.shape[layout.index("B")]:
        raise error("query and key have different batches; they must be the same")
    return int(kv_heads)


def _check_ends(
    query: Tensor, key: Tensor, query_ends: Sequence[int] | None, kv_ends: Sequence[int] | None
) -> None:
    lists = (("actual_seq_qlen", query_ends, query), ("actual_seq_kvlen", kv_ends, key))
    for name, ends, x in lists:
        if not ends:
            raise error(f"{name} is missing; input_layout='TND' needs it")
        if len(ends) > _MOST_SEQUENCES:
            raise error(f"{name} has {len(ends)} entries; {_MOST_SEQUENCES} is the most")
        tokens = x.shape[0]
        if tokens > _MOST_TOKENS:
            raise error(f"{name} goes with {tokens} tokens; {_MOST_TOKENS} is the most")
        taking_part = _without_trailing_zeros(ends)
        before = 0
        for index, end in enumerate(taking_part):
            if end < before:
                raise error(
                    f"{name} has {end} at place {index} after {before}; it is cumulative: each "
                    "entry is the end of a sequence"
                )
            before = end
        if before > tokens:
            raise error(f"{name} ends with {before}; there are only {tokens} tokens")
        if before < tokens and cann_at_least("9.0") and len(taking_part) == len(ends):
            raise error(
                f"{name} ends with {before} and there are {tokens} tokens; from CANN 9.0 a "
                "trailing 0 must say that the rest takes no part"
            )
    assert query_ends is not None
    assert kv_ends is not None
    if len(query_ends) != len(kv_ends):
        raise error(
            f"actual_seq_kvlen has {len(kv_ends)} entries for {len(query_ends)} sequences; "
            "it must have one for each entry of actual_seq_qlen"
        )


def _without_trailing_zeros(ends: Sequence[int]) -> Sequence[int]:
    last = len(ends)
    while last and ends[last - 1] == 0:
        last -= 1
    return ends[:last]


def _check_mask(
    query: Tensor,
    key: Tensor,
    heads: int,
    layout: str,
    mask: Tensor | None,
    mode: int,
    pre_tokens: int,
    next_tokens: int,
) -> None:
    if mode not in _MODES:
        raise error(f"sparse_mode={mode} is not emulated; use 0, 1, 2, 3 or 4")
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.uint8):
        raise error(f"atten_mask is {mask.dtype}; it must be bool or uint8")
    if mode in (2, 3, 4):
        masks.check_compressed(NAME, mask, mode)
        if mode == 4 and pre_tokens + next_tokens < 0:
            raise error(
                f"pre_tockens={pre_tokens} and next_tockens={next_tokens} leave nothing between "
                "them; their sum must not be negative"
            )
        return
    if layout == "TND":
        if mask.dim() != 2:
            raise error(
                f"atten_mask has shape {tuple(mask.shape)}; in TND it must be (longest query, "
                "longest key)"
            )
        return
    batch = query.shape[layout.index("B")]
    square = (query.shape[layout.index("S")], key.shape[layout.index("S")])
    leading = ((), (1, 1), (batch, 1), (batch, heads), (1, heads))
    shapes = [(*first, *square) for first in leading]
    if tuple(mask.shape) not in shapes:
        raise error(
            f"atten_mask has shape {tuple(mask.shape)}; sparse_mode={mode} needs {shapes[0]}, "
            f"{shapes[1]}, {shapes[2]} or {shapes[3]}"
        )


def _check_sink(sink: Tensor | None, heads: int) -> None:
    if sink is None:
        return
    # Not by number: 2.7.1.post2 has it and 2.8.0, which is older, has not.
    release = current().release
    if "Tensor? sink" not in schemas.load(release)[f"npu::{NAME}"]:
        raise error(f"torch_npu {release} has no sink; leave it out")
    if not cann_at_least("8.5"):
        raise error(f"CANN {current().cann} has no sink, 8.5 has; leave it out")
    if sink.dtype != torch.float32 or tuple(sink.shape) != (heads,):
        raise error(
            f"sink is {sink.dtype} of shape {tuple(sink.shape)}; it must be float32 of ({heads},)"
        )

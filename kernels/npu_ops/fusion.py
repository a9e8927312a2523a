"""npu_fusion_attention: attention over this call's keys and values, without a cache.

Formula: softmax(mask(scale * QK^T)) V, from torch_npu's documentation of the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops import fusion_checks, softmax

_MOST = 2147483647
_IN_FULL, _LEFT_UP, _RIGHT_DOWN, _BAND = (0, 1), 2, 3, 4
# How often the operator repeats a row's maximum and sum.
_REPEATS = 8


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _MOST,
    next_tockens: int = _MOST,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """Attention of a training forward, which hosts use for encoders.

    Args:
        query: [B, S, N * D], [S, B, N * D], [B, S, N, D], [B, N, S, D] or [T, N, D], as
            ``input_layout`` says (BSH, SBH, BSND, BNSD, TND); float16, bfloat16 or float32.
        key, value: The same with their own number of heads.
        atten_mask: bool or uint8, 1 where a row does not see a column; without one ``sparse_mode``,
            ``pre_tockens`` and ``next_tockens`` are void.
        actual_seq_qlen, actual_seq_kvlen: In TND, the cumulative ends of the sequences. Zeros at
            the end take no part.
        sink: [N] float32, one more logit per head.

    Returns:
        (attention_out in the query's dtype, softmax_max, softmax_sum, an empty tensor, 0, 0, 0);
        softmax_max and softmax_sum are float32, [B, N, S, 8], in TND [T, N, 8]. Rows of no sequence
        are 0.

    Raises:
        OperatorError: a documented limit is broken, or the emulation does not know an argument.
    """
    others = {
        "pse": pse, "padding_mask": padding_mask, "prefix": prefix, "dropout_mask": dropout_mask
    }  # fmt: skip
    kv_heads = fusion_checks.check(
        query, key, value, head_num, input_layout, atten_mask, keep_prob, pre_tockens, next_tockens,
        inner_precise, actual_seq_qlen, actual_seq_kvlen, sparse_mode, softmax_layout, sink, others,
    )  # fmt: skip
    queries = _rows_first(query, head_num, input_layout)
    keys, values = (_rows_first(x, kv_heads, input_layout) for x in (key, value))
    out = torch.zeros(*queries.shape[:-1], values.shape[-1])
    maxima, sums = torch.zeros(2, *queries.shape[:-1])
    for index, (rows, columns) in enumerate(_sequences(query, key, input_layout, actual_seq_qlen, actual_seq_kvlen)):  # fmt: skip  # noqa: E501
        own, seen = queries[rows], keys[columns]
        if not own.shape[0] or not seen.shape[0]:
            continue
        hidden = _hidden(
            index, own.shape[0], seen.shape[0], atten_mask, sparse_mode, pre_tockens, next_tockens
        )
        if input_layout == "TND" and atten_mask is not None and sparse_mode in _IN_FULL:
            fusion_checks.check_rows(index, hidden)
        found, largest, total = _heads(own, seen, values[columns], scale, hidden, sink)
        out[rows], maxima[rows], sums[rows] = found, largest, total
    result = _laid_out(out.to(query.dtype), input_layout)
    kept = (_repeated(x, input_layout, softmax_layout) for x in (maxima, sums))
    return result, *kept, torch.empty(0, dtype=query.dtype), 0, 0, 0


def _rows_first(x: Tensor, heads: int, layout: str) -> Tensor:
    """[B, S, N, D], or [T, N, D]."""
    if layout in ("BSH", "SBH"):
        x = x.unflatten(-1, (heads, -1))
        return x.transpose(0, 1) if layout == "SBH" else x
    return x.transpose(1, 2) if layout == "BNSD" else x


def _laid_out(out: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return out.transpose(1, 2).contiguous()
    if layout == "SBH":
        out = out.transpose(0, 1)
    return out.flatten(-2).contiguous() if layout in ("BSH", "SBH") else out


def _repeated(x: Tensor, layout: str, softmax_layout: str) -> Tensor:
    if layout != "TND":
        return x.transpose(1, 2)[..., None].repeat(1, 1, 1, _REPEATS)
    wide = x[..., None].repeat(1, 1, _REPEATS)
    # Unless TND is asked for, the numbers lie head by head in a tensor of the same shape.
    return wide if softmax_layout == "TND" else wide.transpose(0, 1).reshape(wide.shape)


def _sequences(
    query: Tensor,
    key: Tensor,
    layout: str,
    query_ends: Sequence[int] | None,
    kv_ends: Sequence[int] | None,
) -> Iterator[tuple[Any, Any]]:
    """Each sequence's rows of the query and of the keys."""
    if layout != "TND":
        for index in range(query.shape[1 if layout == "SBH" else 0]):
            yield index, index
        return
    assert query_ends is not None
    assert kv_ends is not None
    first, kv_first = 0, 0
    for end, kv_end in zip(query_ends, kv_ends, strict=True):
        # A trailing 0 ends nothing: that sequence takes no part.
        yield slice(first, max(first, end)), slice(kv_first, max(kv_first, kv_end))
        first, kv_first = max(first, end), max(kv_first, kv_end)


def _heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None, sink: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if hidden is None or hidden.dim() == 2:
        return softmax.attend(query, key, value, scale, hidden, sink)
    # A mask of its own for each head.
    group = query.shape[1] // key.shape[1]
    parts = [
        softmax.attend(
            query[:, head : head + 1],
            key[:, head // group][:, None],
            value[:, head // group][:, None],
            scale,
            hidden[head],
            None if sink is None else sink[head : head + 1],
        )
        for head in range(query.shape[1])
    ]
    out, maxima, sums = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return out, maxima, sums


def _hidden(
    index: int, rows: int, columns: int, mask: Tensor | None, mode: int, below: int, above: int
) -> Tensor | None:
    """[rows, columns], or [N, rows, columns] of a mask per head; None where all is seen."""
    if mask is None:
        return None
    every = slice(0, columns)
    if mode == _LEFT_UP:
        return softmax.band(rows, every, 0, rows, 0)
    if mode == _RIGHT_DOWN:
        return softmax.band(rows, every, columns - rows, columns + rows, 0)
    if mode == _BAND:
        return softmax.band(rows, every, columns - rows, below, above)
    if mask.dim() == 4:
        mask = mask[0 if mask.shape[0] == 1 else index]
        mask = mask[0] if mask.shape[0] == 1 else mask
    hidden = mask[..., :rows, :columns].bool()
    outside = softmax.band(rows, every, 0, below, above) if mode == 0 else None
    return hidden if outside is None else hidden | outside


KERNELS = {"npu::npu_fusion_attention": npu_fusion_attention}

"""The operators' calls: for all requests in TND, for one in BSH, for single queries in BSH."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ascend_patch.kernels.attention.batch import Part
from ascend_patch.kernels.attention.case import FUSED_INFER_V2, FUSION, Route

# torch_npu's own defaults: as many tokens as there are.
ALL_TOKENS = 2147483647


class Heads(NamedTuple):
    """What a layer's calls share: its heads, the scores' ``scale``, ``sinks`` [num_heads] or None.

    ``mask``: of ``masks``, where the route has one.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sinks: Tensor | None = None
    mask: Tensor | None = None


def together(
    route: Route,
    part: Part,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    heads: Heads,
) -> Tensor:
    """Some requests in one TND call: query [T, Hq, D] to [T, Hq, D].

    key, value: [T, Hk, D] with ``table`` None, or [blocks, block size, Hk * D].
    """
    if route.operator == FUSION:
        return _fusion(route, part, query, key, value, heads)
    kv_lens = part.ends if table is None else part.kv_lens
    block_size = 0 if table is None else key.shape[1]
    before, behind = _tokens(route.pre_tokens), _tokens(route.next_tokens)
    if route.operator == FUSED_INFER_V2:
        sinks = heads.sinks
        found: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2.default(
            query,
            key,
            value,
            atten_mask=heads.mask,
            actual_seq_qlen=part.ends,
            actual_seq_kvlen=kv_lens,
            block_table=table,
            # The operator takes sinks in bfloat16 only.
            learnable_sink=None if sinks is None else sinks.to(torch.bfloat16).contiguous(),
            num_query_heads=heads.num_heads,
            num_key_value_heads=heads.num_kv_heads,
            softmax_scale=heads.scale,
            pre_tokens=before,
            next_tokens=behind,
            input_layout="TND",
            sparse_mode=route.sparse_mode,
            block_size=block_size,
        )[0]
        return found
    attention: Tensor = torch.ops.npu.npu_fused_infer_attention_score.default(
        query,
        key,
        value,
        atten_mask=heads.mask,
        actual_seq_lengths=part.ends,
        actual_seq_lengths_kv=kv_lens,
        block_table=table,
        num_heads=heads.num_heads,
        num_key_value_heads=heads.num_kv_heads,
        scale=heads.scale,
        pre_tokens=before,
        next_tokens=behind,
        input_layout="TND",
        sparse_mode=route.sparse_mode,
        block_size=block_size,
    )[0]
    return attention


def _fusion(
    route: Route, part: Part, query: Tensor, key: Tensor, value: Tensor, heads: Heads
) -> Tensor:
    # A request without queries has no keys here either, and needs no entry.
    ends = [end for start, end in pairwise([0, *part.ends]) if end > start]
    # This operator takes bool and uint8, not int8.
    mask = None if heads.mask is None else heads.mask.view(torch.uint8)
    found: Tensor = torch.ops.npu.npu_fusion_attention.default(
        query,
        key,
        value,
        heads.num_heads,
        "TND",
        atten_mask=mask,
        scale=heads.scale,
        pre_tockens=_tokens(route.pre_tokens),
        next_tockens=_tokens(route.next_tokens),
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=route.sparse_mode,
    )[0]
    return found


def alone(
    route: Route,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Heads,
    kv_lens: list[int] | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """One request in BSH, with the route's mask: query [1, n, Hq, D] to [1, n, Hq, D].

    key, value: [1, S, Hk * D], or a cache [blocks, block size, Hk * D] with its length and row.
    """
    found: Tensor = torch.ops.npu.npu_fused_infer_attention_score.default(
        query.flatten(2),
        key,
        value,
        atten_mask=heads.mask,
        actual_seq_lengths_kv=kv_lens,
        block_table=table,
        num_heads=heads.num_heads,
        num_key_value_heads=heads.num_kv_heads,
        scale=heads.scale,
        pre_tokens=_tokens(route.pre_tokens),
        next_tokens=_tokens(route.next_tokens),
        input_layout="BSH",
        sparse_mode=route.sparse_mode,
        block_size=0 if table is None else key.shape[1],
    )[0]
    return found.view(query.shape)


def single_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lens: list[int],
    table: Tensor | None,
    heads: Heads,
) -> Tensor:
    """A query a request in BSH, every key seen: query [B, Hq, D] to [B, Hq, D].

    key, value: [B, S, Hk * D], or a cache [blocks, block size, Hk * D] with its block table.
    """
    found: Tensor = torch.ops.npu.npu_fused_infer_attention_score.default(
        query.flatten(1)[:, None],
        key,
        value,
        actual_seq_lengths_kv=kv_lens,
        block_table=table,
        num_heads=heads.num_heads,
        num_key_value_heads=heads.num_kv_heads,
        scale=heads.scale,
        input_layout="BSH",
        block_size=0 if table is None else key.shape[1],
    )[0]
    return found.view(query.shape)


def _tokens(found: int | None) -> int:
    return ALL_TOKENS if found is None else found

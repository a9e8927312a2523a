"""An attention case, and the route that answers it: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass

STATES = ("prefill", "cache_hit", "chunked", "decode", "speculative")
ATTENTION_TYPES = ("decoder", "encoder", "encoder_only", "encoder_decoder")
DTYPES = ("bfloat16", "float16", "float32")
# Ascend's systems by the names that its operator documentation uses; `emulated` is CPU tensors
# behind the operator surface: the rules of A2, and float32 beside them.
SYSTEMS = ("A2", "A3", "emulated")

FUSED_INFER = "npu_fused_infer_attention_score"
FUSED_INFER_V2 = "npu_fused_infer_attention_score_v2"
FUSION = "npu_fusion_attention"
NOTHING = "nothing"
HOST = "host"


@dataclass(frozen=True)
class Case:
    """What one attention layer is asked to do in one step.

    Attributes:
        state: ``prefill`` (no request has a token in the cache), ``cache_hit`` (some have),
            ``chunked`` (prompts in parts, mixed with decodes), ``decode`` (one token a request) or
            ``speculative`` (a few).
        causal: A query sees no key behind its own position.
        head_size, num_heads, num_kv_heads: Of the layer on this rank.
        sliding_window: vLLM's: how many keys a query sees, its own included; None for all.
        sinks: The layer has a learned sink a head.
        pooling: The model embeds or classifies. No route depends on it; 0.13.0's did.
        attn_type: vLLM's AttentionType.
        dtype: Of query, key and value.
        kv_dtype: Of the cache; ``auto`` is that of the model.
        block_size: Tokens in a block of the cache.
        max_query_len, min_query_len, max_seq_len: In tokens, over the requests of the batch;
            ``max_seq_len`` 0 is not known.
        batch: Requests.
        padded: There are tokens, or queries, that belong to no request.
        capturing: A device graph is being captured.
        soc: One of SYSTEMS, or another name, which is the host's own.
        torch_npu, cann: Releases.
    """

    state: str
    causal: bool = True
    head_size: int = 128
    num_heads: int = 8
    num_kv_heads: int = 8
    sliding_window: int | None = None
    sinks: bool = False
    pooling: bool = False
    attn_type: str = "decoder"
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    block_size: int = 128
    max_query_len: int = 1
    min_query_len: int = 1
    max_seq_len: int = 0
    batch: int = 1
    padded: bool = False
    capturing: bool = False
    soc: str = "A2"
    torch_npu: str = "2.9.0"
    cann: str = "8.5"


@dataclass(frozen=True)
class Route:
    """Which operator answers a case, and with which arguments.

    Attributes:
        row: The name of the row of ``table`` that matched, refusals included.
        operator: FUSED_INFER, FUSED_INFER_V2, FUSION, NOTHING (an empty batch) or HOST.
        layout: ``TND`` or ``BSH``; empty without an operator.
        sparse_mode: 0 (none), 3 (causal, rows aligned at the end of the keys) or 4 (band).
        mask: ``causal`` (the 2048 x 2048 one) or ``none``.
        pre_tokens, next_tokens: Keys that a query sees before and behind its own; None: all.
        query_lens, kv_lens: ``cumulative``, ``per request`` or ``none``.
        cache: ``none`` (this step's keys), ``paged`` (the cache, by its block table), ``copied``
            (the same of a copy in blocks of 128, for block sizes that the operator does not take;
            so is a paged cache that is not contiguous) or ``gathered`` (paged, but for single
            queries the keys in sight, copied densely).
        per_request: A call for each request with more than one query; one for the others.
        workspace: Who allocates it.
        reason: Why; for HOST the sentence that says what is not supported here.
    """

    row: str
    operator: str
    layout: str = ""
    sparse_mode: int = 0
    mask: str = "none"
    pre_tokens: int | None = None
    next_tokens: int | None = None
    query_lens: str = "none"
    kv_lens: str = "none"
    cache: str = "none"
    per_request: bool = False
    workspace: str = "none"
    reason: str = ""

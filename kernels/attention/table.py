"""The routing table as data: refusals come first, then rows, of which the first match wins.

The limits are those of op-plugin's operator documentation; what four vllm-ascend releases do in
each row's place is in ``releases``. docs/attention.md is written from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ascend_patch.kernels.attention.case import (
    ATTENTION_TYPES,
    DTYPES,
    FUSED_INFER,
    FUSED_INFER_V2,
    FUSION,
    STATES,
    SYSTEMS,
    Case,
)

# 128 and 192 are documented for TND; 64 and 256 are not, and vllm-ascend serves with them.
HEAD_SIZES = (64, 128, 192, 256)
SINK_HEAD_SIZES = (64, 128)
LATENT_HEAD_SIZES = (512, 576)
# In TND the operator refuses a band for these (gemma3).
NO_BAND_IN_TND = (256,)
WIDEST_FUSION_HEAD = 768
MOST_HEADS, MOST_QUERIES_A_KEY_HEAD = 256, 64
MOST_REQUESTS, MOST_REQUESTS_FUSION = 4096, 1024
# Elements of a token's keys in a cache of blocks [block_size, KV heads * head_size].
WIDEST_TOKEN = 65535

Value = bool | str


@dataclass(frozen=True)
class Row:
    """The features that a case must have, and its route.

    ``before`` and ``behind``, the keys that are seen on each side of a query's own, are ``all``,
    ``window`` (sliding_window - 1) or ``own`` (none more).
    """

    name: str
    when: Mapping[str, Value]
    operator: str
    sparse_mode: int
    cache: str
    reason: str
    before: str = "all"
    behind: str = "all"
    layout: str = "TND"
    per_request: bool = False

    @property
    def mask(self) -> str:
        """The compressed modes need the causal mask; mode 0 goes without any."""
        return "causal" if self.sparse_mode else "none"

    @property
    def query_lens(self) -> str:
        """TND takes ends, BSND a length for each."""
        return "cumulative" if self.layout == "TND" else "per request"

    @property
    def kv_lens(self) -> str:
        """Ends as well, but for a paged cache."""
        unpaged = self.layout == "TND" and self.cache == "none"
        return "cumulative" if unpaged else "per request"


@dataclass(frozen=True)
class Refusal:
    """Cases that are left to the host, and the sentence that says so; {case.x} is the case's."""

    name: str
    when: Callable[[Case], bool]
    found: str
    expected: str

    def sentence(self, case: Case) -> str:
        """What was found, what was expected, what happens instead."""
        return f"{self.found.format(case=case)}; {self.expected}: the host's own attention runs."


def is_causal(case: Case) -> bool:
    """Encoders and cross attention see every key, whatever the step's metadata says."""
    return case.causal and case.attn_type == "decoder"


def reads_cache(case: Case) -> bool:
    """Encoders have no cache; cross attention's keys are all in it, from its first step on."""
    if case.attn_type in ("encoder", "encoder_only"):
        return False
    return case.state != "prefill" or case.attn_type == "encoder_decoder"


def features(case: Case) -> dict[str, Value]:
    """What the rows ask of a case."""
    window = case.sliding_window
    return {
        "causal": is_causal(case),
        "cache": reads_cache(case),
        "window": window is not None,
        "sinks": case.sinks,
        "band in TND": case.head_size not in NO_BAND_IN_TND,
        "window covers all": window is not None and 0 < case.max_seq_len <= window,
    }


_ALIGNED = "rows end where the keys end, so a query sees its context and itself"
_TOO_WIDE = (
    "in TND the operator refuses a band for this head size, so each request with more than one "
    "query has a call of its own, and the others one without a mask, on the keys of their windows"
)

ROWS = (
    Row(
        "causal-prefill",
        {"causal": True, "cache": False, "window": False, "sinks": False},
        FUSED_INFER,
        3,
        "none",
        "all keys are this step's; they are cut at the last query, as documented",
    ),
    Row(
        "causal-cache",
        {"causal": True, "cache": True, "window": False, "sinks": False},
        FUSED_INFER,
        3,
        "paged",
        f"keys come from the cache, pooling models' too; {_ALIGNED}",
    ),
    Row(
        "window-prefill",
        {"causal": True, "cache": False, "window": True, "sinks": False, "band in TND": True},
        FUSED_INFER,
        4,
        "none",
        "a band; pre_tokens leaves out the query's own token, which sliding_window counts",
        before="window",
        behind="own",
    ),
    Row(
        "window-cache",
        {"causal": True, "cache": True, "window": True, "sinks": False, "band in TND": True},
        FUSED_INFER,
        4,
        "paged",
        f"a band, in decode too: only in TND it counts for a single query; {_ALIGNED}",
        before="window",
        behind="own",
    ),
    Row(
        "window-covers-prefill",
        {"causal": True, "cache": False, "window covers all": True, "sinks": False},
        FUSED_INFER,
        3,
        "none",
        "no request is longer than the window, which then hides nothing",
    ),
    Row(
        "window-covers-cache",
        {"causal": True, "cache": True, "window covers all": True, "sinks": False},
        FUSED_INFER,
        3,
        "paged",
        "no request is longer than the window, which then hides nothing",
    ),
    Row(
        "wide-window-prefill",
        {"causal": True, "cache": False, "window": True, "sinks": False},
        FUSED_INFER,
        4,
        "none",
        _TOO_WIDE,
        before="window",
        behind="own",
        layout="BSND",
        per_request=True,
    ),
    Row(
        "wide-window-cache",
        {"causal": True, "cache": True, "window": True, "sinks": False},
        FUSED_INFER,
        4,
        "gathered",
        _TOO_WIDE,
        before="window",
        behind="own",
        layout="BSND",
        per_request=True,
    ),
    Row(
        "full-prefill",
        {"causal": False, "cache": False, "window": False, "sinks": False},
        FUSION,
        0,
        "none",
        "every key is seen; the fused inference operator is reported to average without a mask "
        "where keys are not paged (vllm-ascend #13699)",
    ),
    Row(
        "full-cache",
        {"causal": False, "cache": True, "window": False, "sinks": False},
        FUSED_INFER,
        0,
        "paged",
        "every key is seen, those in the cache too, which the fusion operator cannot read",
    ),
    Row(
        "full-window-prefill",
        {"causal": False, "cache": False, "window": True, "sinks": False},
        FUSION,
        4,
        "none",
        "a window to both sides, as vLLM's encoders have it",
        before="window",
        behind="window",
    ),
    Row(
        "full-window-cache",
        {"causal": False, "cache": True, "window": True, "sinks": False, "band in TND": True},
        FUSED_INFER,
        4,
        "paged",
        "a window to both sides",
        before="window",
        behind="window",
    ),
    Row(
        "full-window-covers-cache",
        {"causal": False, "cache": True, "window covers all": True, "sinks": False},
        FUSED_INFER,
        0,
        "paged",
        "no request is longer than the window, which then hides nothing",
    ),
    Row(
        "full-wide-window-cache",
        {"causal": False, "cache": True, "window": True, "sinks": False},
        FUSED_INFER,
        4,
        "gathered",
        f"a window to both sides; {_TOO_WIDE}",
        before="window",
        behind="window",
        layout="BSND",
        per_request=True,
    ),
    Row(
        "sinks-prefill",
        {"causal": True, "cache": False, "window": False, "sinks": True},
        FUSED_INFER_V2,
        3,
        "none",
        "only the second version takes sinks; the mask is the plain causal one",
    ),
    Row(
        "sinks-cache",
        {"causal": True, "cache": True, "window": False, "sinks": True},
        FUSED_INFER_V2,
        3,
        "paged",
        "only the second version takes sinks; the mask is the plain causal one",
    ),
    Row(
        "sinks-window-prefill",
        {"causal": True, "cache": False, "window": True, "sinks": True},
        FUSED_INFER_V2,
        4,
        "none",
        "only the second version takes sinks; a band needs the plain causal mask too",
        before="window",
        behind="own",
    ),
    Row(
        "sinks-window-cache",
        {"causal": True, "cache": True, "window": True, "sinks": True},
        FUSED_INFER_V2,
        4,
        "paged",
        "only the second version takes sinks; a band needs the plain causal mask too",
        before="window",
        behind="own",
    ),
)


def _by_fusion(case: Case) -> bool:
    return not is_causal(case) and not reads_cache(case)


REFUSALS = (
    Refusal(
        "system",
        lambda case: case.soc not in SYSTEMS,
        "The system is {case.soc}",
        "these operators are documented for A2 and A3",
    ),
    Refusal(
        "state",
        lambda case: case.state not in STATES,
        "The state is {case.state!r}",
        f"it must be one of {', '.join(STATES)}",
    ),
    Refusal(
        "attention type",
        lambda case: case.attn_type not in ATTENTION_TYPES,
        "The attention type is {case.attn_type!r}",
        f"it must be one of {', '.join(ATTENTION_TYPES)}",
    ),
    Refusal(
        "capture",
        lambda case: case.capturing,
        "A graph is being captured",
        "the host replays what it captured itself, with arguments of its own",
    ),
    Refusal(
        "quantised cache",
        lambda case: case.kv_dtype not in ("auto", case.dtype),
        "The cache holds {case.kv_dtype}, and the model computes in {case.dtype}",
        "it must hold the model's own dtype, since scales are the host's",
    ),
    Refusal(
        "dtype",
        lambda case: case.dtype not in DTYPES,
        "The dtype is {case.dtype}",
        "it must be bfloat16 or float16",
    ),
    Refusal(
        "float32",
        lambda case: case.dtype == "float32" and case.soc != "emulated" and not _by_fusion(case),
        "The dtype is float32",
        "the fused inference operator takes bfloat16 and float16",
    ),
    Refusal(
        "latent heads",
        lambda case: case.head_size in LATENT_HEAD_SIZES and not _by_fusion(case),
        "A head has {case.head_size} elements",
        "latent attention, and other heads as wide, need operators of their own",
    ),
    Refusal(
        "head size",
        lambda case: (
            case.head_size not in (*HEAD_SIZES, *LATENT_HEAD_SIZES) and not _by_fusion(case)
        ),
        "A head has {case.head_size} elements",
        f"TND takes {', '.join(map(str, HEAD_SIZES))}",
    ),
    Refusal(
        "fusion head size",
        lambda case: not 1 <= case.head_size <= WIDEST_FUSION_HEAD,
        "A head has {case.head_size} elements",
        f"the fusion operator takes 1 to {WIDEST_FUSION_HEAD}",
    ),
    Refusal(
        "heads",
        lambda case: case.num_kv_heads < 1 or case.num_heads % case.num_kv_heads != 0,
        "There are {case.num_heads} query heads and {case.num_kv_heads} key heads",
        "the first must be a multiple of the second",
    ),
    Refusal(
        "too many heads",
        lambda case: (
            case.num_heads > MOST_HEADS
            or case.num_heads > MOST_QUERIES_A_KEY_HEAD * case.num_kv_heads
        ),
        "There are {case.num_heads} query heads on {case.num_kv_heads} key heads",
        f"the limits are {MOST_HEADS}, and {MOST_QUERIES_A_KEY_HEAD} on one key head",
    ),
    Refusal(
        "wide token",
        lambda case: reads_cache(case) and case.num_kv_heads * case.head_size > WIDEST_TOKEN,
        "A token's keys are {case.num_kv_heads} heads of {case.head_size} elements",
        f"a paged cache takes at most {WIDEST_TOKEN} elements",
    ),
    Refusal(
        "requests",
        lambda case: case.batch > (MOST_REQUESTS_FUSION if _by_fusion(case) else MOST_REQUESTS),
        "The batch has {case.batch} requests",
        f"TND takes {MOST_REQUESTS}, the fusion operator {MOST_REQUESTS_FUSION}",
    ),
    Refusal(
        "window",
        lambda case: case.sliding_window is not None and case.sliding_window < 1,
        "The sliding window is {case.sliding_window}",
        "it counts the query's own token, so it must be at least 1",
    ),
    Refusal(
        "sinks without a causal mask",
        lambda case: case.sinks and not is_causal(case),
        "There are sinks, and the attention is not causal",
        "no model has that, so no operator was tried",
    ),
    Refusal(
        "sinks' head size",
        lambda case: case.sinks and case.head_size not in SINK_HEAD_SIZES,
        "There are sinks, and a head has {case.head_size} elements",
        "with sinks the operator takes 64 and 128",
    ),
    Refusal(
        "sinks' dtype",
        lambda case: case.sinks and case.dtype == "float16",
        "There are sinks, and the dtype is float16",
        "sinks must be bfloat16, and so must the rest",
    ),
)

"""The rows of the routing table, of which one matches each case that nothing refuses.

The limits are those of op-plugin's operator documentation; what four vllm-ascend releases do in
each row's place is in ``releases``. docs/attention.md is written from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ascend_patch.kernels.attention.case import FUSED_INFER, FUSED_INFER_V2, FUSION, Case

# CANN's code takes these alone in TND with a band, or with sinks.
BAND_HEAD_SIZES = (64, 128)
BLOCK_MULTIPLE, LARGEST_BLOCK = 16, 1024

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


def is_causal(case: Case) -> bool:
    """Encoders and cross attention see every key, whatever the step's metadata says."""
    return case.causal and case.attn_type == "decoder"


def reads_cache(case: Case) -> bool:
    """Encoders have no cache; cross attention's keys are all in it, from its first step on."""
    if case.attn_type in ("encoder", "encoder_only"):
        return False
    return case.state != "prefill" or case.attn_type == "encoder_decoder"


def fits_tnd(case: Case, band: bool) -> bool:
    """Whether CANN takes the head size in TND; what it does not is computed a request at a time."""
    if band or case.head_size in BAND_HEAD_SIZES:
        return case.head_size in BAND_HEAD_SIZES
    if case.head_size != 192:
        # Some CANN refuses 256, for grouped queries too: its error names 192, 128 and 64 alone.
        return False
    # Without groups the kernel for 192 has no float16.
    return case.num_heads != case.num_kv_heads or case.dtype != "float16"


def is_pageable(block_size: int, *, tnd: bool, head_size: int) -> bool:
    """Whether the layout reads blocks of so many tokens; if not, they are copied into others."""
    if not tnd:
        return block_size in (128, 256, 384, 512)
    if head_size not in BAND_HEAD_SIZES:
        return block_size == 128
    return block_size % BLOCK_MULTIPLE == 0 and 0 < block_size <= LARGEST_BLOCK


def window_hides(case: Case) -> bool:
    """Whether a band is needed; where TND takes none, not if no request is longer than it."""
    window = case.sliding_window
    if window is None:
        return False
    return fits_tnd(case, band=True) or not 0 < case.max_seq_len <= window


def features(case: Case) -> dict[str, Value]:
    """What the rows ask of a case."""
    window = window_hides(case)
    return {
        "causal": is_causal(case),
        "cache": reads_cache(case),
        "window": window,
        "sinks": case.sinks,
        "TND": fits_tnd(case, band=window),
    }


_ALIGNED = "rows end where the keys end, so a query sees its context and itself"
_PRE_TOKENS = "pre_tokens leaves out the query's own token, which sliding_window counts"
_ALONE = (
    "CANN has no kernel for this in TND, so each request with several queries has a call of its "
    "own, and the others have one together"
)
_IN_SIGHT = "for a single query only the keys in sight are read, as BSH has no window there"


def _row(name: str, when: str, operator: str, mode: int, cache: str, why: str, to: str = "") -> Row:
    """``when``: features that must be, or with ``no`` before them must not; ``to``: of a band."""
    asked = {word.removeprefix("no-"): not word.startswith("no-") for word in when.split()}
    before, _, behind = (to or "all/all").partition("/")
    alone = asked.get("TND") is False
    return Row(
        name,
        asked,
        operator,
        mode,
        cache,
        why,
        before=before,
        behind=behind,
        layout="BSH" if alone else "TND",
        per_request=alone,
    )


_C = "causal no-sinks"
_F = "no-causal no-sinks"
ROWS = (
    _row(
        "causal-prefill",
        f"{_C} TND no-cache no-window",
        FUSED_INFER,
        3,
        "none",
        "all keys are this step's; they are cut at the last query, as documented",
    ),
    _row(
        "causal-cache",
        f"{_C} TND cache no-window",
        FUSED_INFER,
        3,
        "paged",
        f"keys come from the cache, pooling models' too; {_ALIGNED}",
    ),
    _row(
        "window-prefill",
        f"{_C} TND no-cache window",
        FUSED_INFER,
        4,
        "none",
        f"a band; {_PRE_TOKENS}",
        "window/own",
    ),
    _row(
        "window-cache",
        f"{_C} TND cache window",
        FUSED_INFER,
        4,
        "paged",
        f"a band, in decode too, where other layouts have none; {_PRE_TOKENS}",
        "window/own",
    ),
    _row(
        "full-prefill",
        f"{_F} no-cache no-window",
        FUSION,
        0,
        "none",
        "every key is seen; without a mask the fused inference operator is reported to average "
        "over keys that are not paged (vllm-ascend #13699)",
    ),
    _row(
        "full-window-prefill",
        f"{_F} no-cache window",
        FUSION,
        4,
        "none",
        "a window to both sides, as vLLM's encoders have it",
        "window/window",
    ),
    _row(
        "full-cache",
        f"{_F} TND cache no-window",
        FUSED_INFER,
        0,
        "paged",
        "every key is seen, those in the cache too, which the fusion operator cannot read",
    ),
    _row(
        "full-window-cache",
        f"{_F} TND cache window",
        FUSED_INFER,
        4,
        "paged",
        "a window to both sides, as vLLM has it from 0.25 on, where a decoder is not causal",
        "window/window",
    ),
    _row(
        "sinks-prefill",
        "sinks no-cache no-window",
        FUSED_INFER_V2,
        3,
        "none",
        "only the second version takes sinks",
    ),
    _row(
        "sinks-cache",
        "sinks cache no-window",
        FUSED_INFER_V2,
        3,
        "paged",
        "only the second version takes sinks",
    ),
    _row(
        "sinks-window-prefill",
        "sinks no-cache window",
        FUSED_INFER_V2,
        4,
        "none",
        "only the second version takes sinks; a band needs the plain causal mask too",
        "window/own",
    ),
    _row(
        "sinks-window-cache",
        "sinks cache window",
        FUSED_INFER_V2,
        4,
        "paged",
        "only the second version takes sinks; a band needs the plain causal mask too",
        "window/own",
    ),
    _row("alone-prefill", f"{_C} no-TND no-cache no-window", FUSED_INFER, 3, "none", _ALONE),
    _row("alone-cache", f"{_C} no-TND cache no-window", FUSED_INFER, 3, "paged", _ALONE),
    _row(
        "alone-window-prefill",
        f"{_C} no-TND no-cache window",
        FUSED_INFER,
        4,
        "none",
        _ALONE,
        "window/own",
    ),
    _row(
        "alone-window-cache",
        f"{_C} no-TND cache window",
        FUSED_INFER,
        4,
        "gathered",
        f"{_ALONE}; {_IN_SIGHT}",
        "window/own",
    ),
    _row("alone-full-cache", f"{_F} no-TND cache no-window", FUSED_INFER, 0, "paged", _ALONE),
    _row(
        "alone-full-window-cache",
        f"{_F} no-TND cache window",
        FUSED_INFER,
        4,
        "gathered",
        f"{_ALONE}; {_IN_SIGHT}",
        "window/window",
    ),
)

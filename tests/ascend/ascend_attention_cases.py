"""Steps of attention as data: what tests run on each release, unpatched and patched.

A case is a name, the model (`ascend_attention.Model`) and the step (`ascend_attention.Batch`).
"""

from __future__ import annotations

from typing import Any

Case = tuple[dict[str, Any], dict[str, Any]]

WINDOW = 20
# State to cached tokens and tokens of this step: two requests, one of them in its second block.
STEPS = {
    "PrefillNoCache": ([0, 0], [150, 7]),
    "PrefillCacheHit": ([130, 3], [5, 40]),
    "ChunkedPrefill": ([140, 0, 130], [1, 41, 9]),
    "DecodeOnly": ([130, 30], [1, 1]),
    "SpecDecoding": ([130, 29], [2, 3]),
}


def _step(state: str, **more: Any) -> dict[str, Any]:
    contexts, lens = STEPS[state]
    return {"contexts": contexts, "query_lens": lens, "state": state, **more}


def _each_state(prefix: str, model: dict[str, Any], **more: Any) -> dict[str, Case]:
    return {f"{prefix} {state}": (model, _step(state, **more)) for state in STEPS}


CASES: dict[str, Case] = {
    **_each_state("plain", {}),
    **_each_state("pooling", {"runner": "pooling"}),
    **_each_state("window", {"window": WINDOW}),
    **_each_state("wide window", {"window": 500}),
    **_each_state("window 256", {"window": WINDOW, "size": 256}),
    **_each_state("window pooling", {"runner": "pooling", "window": WINDOW}),
    **_each_state("head 192", {"size": 192}),
    **_each_state("head 64", {"size": 64}),
    **_each_state("sinks", {"sinks": True, "dtype": "bfloat16"}),
    **_each_state("sinks window", {"sinks": True, "window": WINDOW, "dtype": "bfloat16"}),
    **_each_state("full", {}, causal=False),
    **_each_state("full pooling", {"runner": "pooling"}, causal=False),
    "encoder": (
        {"runner": "pooling", "attn_type": "encoder_only"},
        _step("PrefillNoCache", causal=False),
    ),
    "encoder window": (
        {"runner": "pooling", "attn_type": "encoder_only", "window": WINDOW},
        _step("PrefillNoCache", causal=False),
    ),
    "cross": ({"attn_type": "encoder_decoder"}, _step("ChunkedPrefill", causal=False)),
    "padded": ({}, _step("ChunkedPrefill", padding=3)),
    "padded window": ({"window": WINDOW}, _step("ChunkedPrefill", padding=3)),
    "dummy request": ({}, _step("ChunkedPrefill", padding=3, dummies=1)),
    "dummy request pooling": (
        {"runner": "pooling"},
        _step("PrefillCacheHit", padding=3, dummies=1),
    ),
    "empty": ({}, {"contexts": [], "query_lens": [], "state": "ChunkedPrefill", "padding": 2}),
    "mixed window": (
        {"window": WINDOW, "heads": 8, "kv_heads": 1},
        {
            "contexts": [19, 300, 0, 20, 0],
            "query_lens": [1, 1, 1, 130, 20],
            "state": "ChunkedPrefill",
        },
    ),
}

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

# Of the releases' table (`kernels/attention/releases.json`): what no single step on a CPU shows.
ELSEWHERE = {
    "310P": "classes of its own; see test_attention_untouched_on_vllm_ascend",
    "captured decode": "see test_attention_untouched_on_vllm_ascend",
    "capture": "see test_attention_untouched_on_vllm_ascend",
    "capture window": "see test_attention_untouched_on_vllm_ascend",
    "int8 pooling": "see test_attention_c8_on_vllm_ascend",
    "latent and wide heads": "other operators, which are not emulated",
    "nothing": "see test_attention_on_vllm_ascend",
    "speculation": "the builder's own assertion, before there is a step",
}
_STATES = {
    "prefill": "PrefillNoCache",
    "cache_hit": "PrefillCacheHit",
    "chunked": "ChunkedPrefill",
    "decode": "DecodeOnly",
    "speculative": "SpecDecoding",
}


def of_example(example: dict[str, Any]) -> Case:
    """The model and the step of an example in the releases' table; three requests."""
    state = example["state"]
    longest, width = example.get("max_seq_len", 0), example.get("max_query_len", 1)
    lens = [width] * 3 if state in ("decode", "speculative") else [width, 3, 1]
    contexts = [0, 0, 0] if state == "prefill" else [longest - width, 20, 5]
    names = {"head_size": "size", "sliding_window": "window", "sinks": "sinks"}
    model: dict[str, Any] = {new: example[old] for old, new in names.items() if old in example}
    model |= {"heads": 8, "kv_heads": 8, "attn_type": example.get("attn_type", "decoder")}
    model["runner"] = "pooling" if example.get("pooling") else "generate"
    if example.get("sinks"):
        model["dtype"] = "bfloat16"
    step = {"contexts": contexts, "query_lens": lens, "state": _STATES[state]}
    step["causal"] = example.get("causal", True) and model["attn_type"] == "decoder"
    if example.get("padded"):
        step |= {"padding": 3, "dummies": 1}
    return model, step

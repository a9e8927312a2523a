"""vllm-ascend's attention, where a release sends a step to an operator that computes another one.

Each wrapper asks what is cheap to ask and is true of few steps; only then a case is made of the
step, and the table in `kernels/attention` says which operator answers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend_patch.impl import attention_ascend_steps as steps
from ascend_patch.impl.attention_ascend_steps import Step

LOSES_CACHE = "cached tokens ignored"
NO_WINDOW = "window ignored"
ONE_KEY_TOO_MANY = "window one key too wide"
CAUSAL_MASK = "causal mask on attention that is not causal"
SINKS_MASK = "sinks with the mask of a window in place of the causal one"
NO_SINKS = "sinks ignored"
LENGTHS = "lengths of fewer requests than there are queries"
EMPTY = "a batch without queries"
WINDOW_ROWS = ("window-prefill", "window-cache", "sinks-window-prefill", "sinks-window-cache")


def _mended(
    wrapped: Any,
    instance: Any,
    args: Any,
    kwargs: Any,
    ignored: Callable[[Any], str],
    defect_of: Callable[[Any, Any], str],
    cached: Callable[[Any, Step], tuple[Any, Any]],
) -> Any:
    """`forward`, by a route where the release gets the step wrong.

    Args:
        ignored: What the release leaves out of a layer in a graph that it captures, if anything.
        defect_of: What it gets wrong in a step, by layer and metadata; empty where nothing is.
        cached: As `steps.answered` takes it.
    """
    metadata = args[5] if len(args) > 5 else kwargs.get("attn_metadata")
    if not (steps.is_of_the_builder(metadata) and steps.is_plain(instance)):
        steps.left_for_kind(instance, metadata, ignored(instance))
        return wrapped(*args, **kwargs)
    left_out = ignored(instance)
    if left_out and steps.is_capturing(instance):
        return steps.left_captured(wrapped, left_out, args, kwargs)
    defect = defect_of(instance, metadata)
    if defect:
        step = Step(*args, **kwargs)
        if steps.answered(instance, step, defect, cached):
            return step.output
    return wrapped(*args, **kwargs)


def forward_0_13(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`AscendAttentionBackendImpl.forward` of 0.13.0."""
    how = (_ignored_0_13, _defect_0_13, _cached_0_13)
    return _mended(wrapped, instance, args, kwargs, *how)


def _ignored_0_13(instance: Any) -> str:
    return "" if instance.sliding_window is None else NO_WINDOW


def _defect_0_13(instance: Any, metadata: Any) -> str:
    """What the release gets wrong in this step; empty where nothing is."""
    state = metadata.attn_state.name
    if metadata.model_runner_type == "pooling":
        # npu_fusion_attention for all of them: it is given this step's keys, and no window.
        if state != "PrefillNoCache" and instance.attn_type == "decoder":
            return LOSES_CACHE
        if steps.hides_something(instance.sliding_window, metadata):
            return NO_WINDOW
    elif not metadata.causal:
        # A single query, at the end of the keys, sees all of them under the causal mask too.
        if metadata.max_query_len > 1:
            return CAUSAL_MASK
    # Decode also copies the whole cache, and leaves its result where nobody looks for it.
    elif steps.hides_something(instance.sliding_window, metadata) or (
        instance.sliding_window is not None and state == "DecodeOnly"
    ):
        return NO_WINDOW
    return _lengths(metadata)


def _cached_0_13(instance: Any, step: Step) -> tuple[Any, Any]:
    found: tuple[Any, Any] = instance.reshape_and_cache(
        step.key, step.value, step.kv_cache, step.attn_metadata
    )
    return found


def forward_0_18(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`AscendAttentionBackendImpl.forward` of 0.18.0."""
    how = (_ignored_0_18, _defect_0_18, _cached_0_18)
    return _mended(wrapped, instance, args, kwargs, *how)


def _ignored_0_18(instance: Any) -> str:
    return _ignored_0_13(instance) if instance.sinks is None else NO_SINKS


def _defect_0_18(instance: Any, metadata: Any) -> str:
    state, window = metadata.attn_state.name, instance.sliding_window
    if not metadata.causal:
        if metadata.model_runner_type == "pooling":
            if state != "PrefillNoCache" and instance.attn_type == "decoder":
                return LOSES_CACHE
            if steps.hides_something(window, metadata):
                return NO_WINDOW
        elif metadata.max_query_len > 1:
            return CAUSAL_MASK
    elif window is not None:
        if instance.sinks is not None:
            # Its mask has the window in it, where the operator wants the causal one and a number.
            return SINKS_MASK
        if state == "DecodeOnly" or steps.hides_something(window, metadata):
            return NO_WINDOW
    return _lengths(metadata)


def _cached_0_18(instance: Any, step: Step) -> tuple[Any, Any]:
    _, key, value, _ = instance.reshape_and_cache(
        step.query, step.key, step.value, step.kv_cache, step.attn_metadata, step.output
    )
    return key, value


def _lengths(metadata: Any) -> str:
    """Padding that the operators refuse (vllm-ascend #10769), and steps without a query."""
    ends = metadata.actual_seq_lengths_q
    if len(ends) > len(metadata.seq_lens_list):
        return LENGTHS
    return "" if ends and ends[-1] else EMPTY


def forward_0_23(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`AscendAttentionBackendImpl.forward` of 0.23.0, which gives the window as pre_tokens.

    An operator keeps pre_tokens keys before a query's own, and vLLM's window counts that one. What
    the method reads is what it captures, and what it captures is what a replay gives the operator:
    the right number, for as long as it runs, mends all three.
    """
    metadata = args[5] if len(args) > 5 else kwargs.get("attn_metadata")
    if not (steps.is_of_the_builder(metadata) and steps.is_plain(instance)):
        window = ONE_KEY_TOO_MANY if instance.sliding_window is not None else ""
        steps.left_for_kind(instance, metadata, window)
        return wrapped(*args, **kwargs)
    defect = _defect_0_23(instance, metadata)
    if defect:
        step = Step(*args, **kwargs)
        if steps.answered(instance, step, defect, _cached_0_18):
            return step.output
    return _with_the_window(wrapped, instance, args, kwargs)


def _defect_0_23(instance: Any, metadata: Any) -> str:
    if metadata.model_runner_type == "pooling" and not metadata.causal:
        return _defect_0_18(instance, metadata)
    return _lengths(metadata)


def _with_the_window(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    window = instance.sliding_window
    # While it captures, the release takes 0 for no window at all.
    if window is None or window < 2 or _counts_otherwise(instance):
        if window is not None and not steps.withdrawn:
            why = "a window of one key" if window < 2 else "kv-comp's selected keys"
            steps.left(f"{ONE_KEY_TOO_MANY}, and left so: {why}")
        return wrapped(*args, **kwargs)
    instance.sliding_window = window - 1
    try:
        return wrapped(*args, **kwargs)
    finally:
        instance.sliding_window = window


def _counts_otherwise(instance: Any) -> bool:
    """With kv-comp's selected keys, or as the self-test at load saw the operator do."""
    if instance.enable_hamming_sparse:
        return True
    if not steps.withdrawn:
        return False
    return any((row, steps.configuration(instance)) in steps.withdrawn for row in WINDOW_ROWS)


def forward_c8(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`AscendC8AttentionBackendImpl.forward` of 0.18.0: causal pooling reads the int8 cache.

    The release sends everything that pools to npu_fusion_attention, which is given this step's
    quantised keys as they are. Its own paths for an int8 cache are right, and are taken by whatever
    does not pool.
    """
    metadata = args[5] if len(args) > 5 else kwargs.get("attn_metadata")
    if (
        metadata is None
        or metadata.model_runner_type != "pooling"
        or not metadata.causal
        or not steps.is_plain(instance, "AscendC8AttentionBackendImpl")
    ):
        if metadata is not None and steps.hides_something(instance.sliding_window, metadata):
            steps.left(f"{NO_WINDOW} over an int8 cache")
        elif metadata is not None and not metadata.causal:
            steps.left(f"{CAUSAL_MASK}, over an int8 cache")
        return wrapped(*args, **kwargs)
    metadata.model_runner_type = "generate"
    try:
        return wrapped(*args, **kwargs)
    finally:
        metadata.model_runner_type = "pooling"


def forward_c8_0_23(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The same of 0.23.0, where a prefill node's steps go on to the base class's operators."""
    plain = steps.is_plain(instance, "AscendC8AttentionBackendImpl")
    if not plain or instance.vllm_config.kv_transfer_config is None:
        return forward_c8(wrapped, instance, args, kwargs)

    def with_the_window(*args: Any, **kwargs: Any) -> Any:
        return _with_the_window(wrapped, instance, args, kwargs)

    return forward_c8(with_the_window, instance, args, kwargs)

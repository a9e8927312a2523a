"""vllm-ascend 0.11.0's attention: windows, and heads of 192 elements. It has no pooling branch."""

from __future__ import annotations

import sys
from typing import Any

from ascend_patch.impl import attention_ascend_steps as steps
from ascend_patch.impl.attention_ascend import NO_WINDOW
from ascend_patch.impl.attention_ascend_steps import Step

BY_TORCH = "attention in plain torch"


def forward(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`AscendAttentionBackendImpl.forward` of 0.11.0.

    With trace_flag, which is its default, it only calls the operator that comes back here.
    """
    window = instance.sliding_window
    if window is None and instance.head_size != 192:
        return wrapped(*args, **kwargs)
    # The last positional argument there is, if anybody gives it so.
    traced = args[7] if len(args) > 7 else kwargs.get("trace_flag", True)
    metadata = args[5] if len(args) > 5 else kwargs.get("attn_metadata")
    if traced or metadata is None:
        return wrapped(*args, **kwargs)
    if not steps.is_plain(instance):
        steps.left_for_kind(instance, metadata, NO_WINDOW if window is not None else "")
        return wrapped(*args, **kwargs)
    if window is not None and steps.is_capturing(instance):
        return steps.left_captured(wrapped, NO_WINDOW, args, kwargs)
    defect = _defect(instance, metadata)
    if not defect:
        return wrapped(*args, **kwargs)
    step = Step(*args, **kwargs)
    if _is_quantised(step):
        steps.left(f"{defect}, and left so: the layer has an int8 cache and a method of its own")
        return wrapped(*args, **kwargs)
    if not steps.answered(instance, _viewed(instance, step), defect, _cached):
        return wrapped(*args, **kwargs)
    return step.output.view(step.query.shape[0], instance.hidden_size)


def _defect(instance: Any, metadata: Any) -> str:
    state, window = metadata.attn_state.name, instance.sliding_window
    if instance.attn_type not in ("decoder", "encoder_only"):
        return ""
    # Decode is never given a window that counts, and copies the whole cache for it.
    in_decode = window is not None and state == "DecodeOnly"
    if in_decode or steps.hides_something(window, metadata):
        return NO_WINDOW
    in_parts = state in ("ChunkedPrefill", "SpecDecoding")
    if instance.head_size == 192 and instance.attn_type == "decoder" and in_parts:
        return BY_TORCH
    return ""


def _is_quantised(step: Step) -> bool:
    """Layers with an int8 cache of their own have a method of their own."""
    int8 = len(step.kv_cache) > 0 and "int8" in str(step.kv_cache[0].dtype)
    return int8 and hasattr(step.layer, "quant_method")


def _viewed(instance: Any, step: Step) -> Step:
    """Query, key and value [T, heads * size] as [T, heads, size]."""
    size = instance.head_size
    assert step.key is not None
    assert step.value is not None
    return step._replace(
        query=step.query.view(-1, instance.num_heads, size),
        key=step.key.view(-1, instance.num_kv_heads, size),
        value=step.value.view(-1, instance.num_kv_heads, size).contiguous(),
    )


def _cached(instance: Any, step: Step) -> tuple[Any, Any]:
    """Write the cache as the release does within its forward."""
    key, value, metadata = step.key, step.value, step.attn_metadata
    if len(step.kv_cache) > 1:
        if instance.key_cache is None:
            instance.key_cache, instance.value_cache = step.kv_cache[0], step.kv_cache[1]
        assert key is not None
        assert value is not None
        tokens = metadata.num_actual_tokens
        sys.modules[steps.MODULE].torch_npu._npu_reshape_and_cache(
            key=key[:tokens],
            value=value[:tokens],
            key_cache=instance.key_cache,
            value_cache=instance.value_cache,
            slot_indices=metadata.slot_mapping,
        )
    return key, value

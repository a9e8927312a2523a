"""Requests that begin with one token, in a batch that decodes.

vLLM up to 0.30, and vllm-ascend up to 0.18, take a step of one token for decode, and decode goes on
from what the last owner has left in a request's slot: all that such a request answers is wrong. Its
slot is emptied before the step, by the builder, which runs outside of captured graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

_NONE = np.empty(0, dtype=np.int64)
# The layers that a builder builds for, by name. Releases up to 0.27 do not keep them.
_layers: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def remember_layers(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`GDNAttentionMetadataBuilder.__init__`: keep the names of its layers."""
    wrapped(*args, **kwargs)
    _layers[instance] = tuple(_names(*args, **kwargs))


def _names(
    kv_cache_spec: Any, layer_names: Sequence[str], vllm_config: Any, device: Any
) -> Sequence[str]:
    del kv_cache_spec, vllm_config, device
    return layer_names


def rows(common: Any, starts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Which requests of a batch begin in this step, with one token.

    Args:
        common: CommonAttentionMetadata of B requests, those that pad the batch included.
        starts: int [B + 1], where each begins.

    Returns:
        int64 [N], their rows.
    """
    # vLLM's field, behind a property that waits for the device where a runner gave no number; and
    # vllm-ascend's, whose class has both.
    fields = vars(common)
    computed = fields.get("_num_computed_tokens_cpu")
    if computed is None:
        computed = fields.get("num_computed_tokens_cpu")
    requests = len(starts) - 1
    if computed is None or computed.device.type != "cpu" or len(computed) < requests:
        return _NONE
    context = computed.numpy()[:requests]
    # Every step of decode comes here, and in most nobody begins.
    return _NONE if context.all() else np.flatnonzero((np.diff(starts) == 1) & (context == 0))


def empty(builder: Any, slots: Tensor) -> None:
    """Set the states of these slots to zero, in every layer of the builder.

    Args:
        builder: A GDNAttentionMetadataBuilder.
        slots: int [N], on the device of the caches.
    """
    # A builder that nobody made with an engine, in the hosts' own tests, has names and no layers.
    layers = getattr(builder.vllm_config.compilation_config, "static_forward_context", {})
    places = slots.long()
    for name in _layers.get(builder, ()):
        for state in _states(layers[name]) if name in layers else ():
            # Not index_fill_, which on an NPU reads its index back.
            state[places] = 0


def _states(layer: Any) -> list[Tensor]:
    """The caches of a layer, each [slots, ...]; up to 0.18 there is a tuple of them per engine."""
    cache = layer.kv_cache
    tensors = cache if isinstance(cache[0], Tensor) else cache[0]
    # Before caches are bound, when a profile run builds, they are empty.
    return [tensor for tensor in tensors if tensor.numel()]

"""The GDN layers and builders of vLLM 0.11 to 0.19 on GPUs: prefill without a look at the device.

A batch with prefill whose metadata carries chunk tables runs on the bundled kernels. All others,
decode and captured graphs among them, are the release's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_metadata, gdn_vllm_trial
from ascend_patch.impl.gdn_core import core
from ascend_patch.impl.gdn_vllm_build import Release, build

FLASHINFER = "FlashInfer's prefill was chosen; it stays, and reads no chunk tables"
Seam = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


# --- builders -----------------------------------------------------------------------------------


def _building(release: Release) -> Seam:
    """A wrapt wrapper of GDNAttentionMetadataBuilder.build."""

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return build(release, instance, *args, **kwargs)

    return wrapper


_EARLY = Release(pads=True, finds_context=True, has_modes=False, counts_empty=True)
build_0_11_0 = _building(replace(_EARLY, token_masks=True))
build_0_11_1 = _building(_EARLY)
build_0_13 = _building(replace(_EARLY, pads=False))
build_0_14 = _building(Release(has_modes=False, counts_empty=True))
build_0_15 = _building(Release(counts_empty=True))
build_0_17 = _building(Release(either=True))


# --- layers -------------------------------------------------------------------------------------


def _layer(layout: str, *, by_engine: bool = True) -> Seam:
    """A wrapt wrapper of `_forward_core`.

    Args:
        layout: Of the release's states.
        by_engine: A layer has caches for each virtual engine.
    """

    def forward_core(
        layer: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor
    ) -> bool:
        found = _ours(layer, mixed_qkv, layout, by_engine=by_engine)
        if found is None:
            return False
        metadata, caches = found
        core(layer, mixed_qkv, b, a, core_attn_out, metadata, state_layout=layout, **caches)
        return True

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return None if forward_core(instance, *args, **kwargs) else wrapped(*args, **kwargs)

    return wrapper


forward_core_0_11 = _layer("KV")
forward_core_0_16 = _layer("VK")
forward_core_0_19 = _layer("VK", by_engine=False)


def forward_0_11_0(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Qwen3NextGatedDeltaNet._forward of 0.11.0: the projections and the norm are in it too."""
    return None if _forward(instance, *args, **kwargs) else wrapped(*args, **kwargs)


def _forward(layer: Any, hidden_states: Tensor, output: Tensor) -> bool:
    found = _ours(layer, hidden_states, "KV", by_engine=True)
    if found is None:
        return False
    metadata, caches = found
    tokens = metadata.num_actual_tokens
    hidden_states = hidden_states[:tokens]
    projected, _ = layer.in_proj_qkvz(hidden_states)
    gates, _ = layer.in_proj_ba(hidden_states)
    query, key, value, z, b, a = layer.fix_query_key_value_ordering(projected, gates)
    mixed = torch.cat([x.flatten(1) for x in (query, key, value)], dim=-1)
    result = torch.empty(z.shape, dtype=mixed.dtype, device=mixed.device)
    core(layer, mixed, b, a, result, metadata, state_layout="KV", **caches)
    size = z.shape[-1]
    normed = layer.norm(result.view(-1, size), z.reshape(-1, size))
    output[:tokens], _ = layer.out_proj(normed.view(tokens, -1))
    return True


def _ours(
    layer: Any, x: Tensor, layout: str, *, by_engine: bool
) -> tuple[Any, dict[str, Tensor]] | None:
    """The metadata and the caches of a step that the bundled kernels take; None for all others.

    Decided before anything is written.
    """
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    if context.attn_metadata is None:
        # A profile run: compile now what the first prompt would wait for.
        if not uses_flashinfer(layer):
            gdn_vllm_trial.warm(layer, x, layout)
        return None
    metadata = context.attn_metadata[layer.prefix]
    if gdn_metadata.of(metadata) is None:
        return None
    conv_state, ssm_state = layer.kv_cache[context.virtual_engine] if by_engine else layer.kv_cache
    caches = {"conv_state": conv_state.transpose(-1, -2), "ssm_state": ssm_state}
    refusal = (
        FLASHINFER
        if uses_flashinfer(layer)
        else gdn_vllm_trial.refusal(layer, x.dtype, layout, metadata.num_spec_decodes > 0, **caches)
    )
    if refusal:
        gdn_metadata.left(refusal)
        return None
    return metadata, caches


def uses_flashinfer(layer: Any) -> bool:
    """Whether the release has chosen FlashInfer's kernel for this layer's prefill (from 0.17)."""
    operator = getattr(layer, "chunk_gated_delta_rule", None)
    return getattr(getattr(operator, "_forward_method", None), "__name__", "") == "forward_cuda"

"""Whether the bundled kernels take a GDN layer, found out on scratch memory before they write.

A step of the layer's shapes, dtypes and strides runs through them once; what one does not take, or
cannot be compiled for, leaves the layer to the release. It also compiles them, which a profile run
pays for.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ascend_patch._log import get_logger
from ascend_patch.impl import gdn_metadata
from ascend_patch.impl.gdn_core import core
from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import (
    build_chunk_metadata,
    chunk_triton,
    conv_triton,
    gating_triton,
    recurrent_triton,
)
from ascend_patch.kernels.triton_device import has_triton

logger = get_logger(__name__)

# Not the reference: it is slower than what it would replace, and reads the device.
KERNELS = "triton"
# What a step with prefill calls; drafts beside it take the last two.
OPERATORS = (
    "causal_conv1d",
    "fused_gating",
    "chunk_gated_delta_rule",
    "causal_conv1d_update",
    "recurrent_gated_delta_rule",
)
# Requests of the steps that are tried: kernels part states by how many there are. The first of them
# has more than a chunk.
BATCHES = (1, 2, 4, 8, 16)
FIRST, OTHERS = 65, 16

# Once, before anything is tried: what a self-test withdraws stays withdrawn.
if has_triton("nvidia"):
    for _module in (conv_triton, gating_triton, chunk_triton, recurrent_triton):
        _module.register()

# What was found for a layer's caches, which vLLM may bind anew with other strides.
_verdicts: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shapes:
    """All that a kernel can ask of a layer. Parameters: (shape, strides, dtype).

    Attributes:
        columns: Slots of a request in the block table.
        speculative: Whether the step has a request that verifies drafts.
        offered: The implementations of each operator; a self-test may have withdrawn some.
    """

    device: torch.device
    dtype: torch.dtype
    layout: str
    conv_state: tuple[Any, ...]
    ssm_state: tuple[Any, ...]
    weight: tuple[Any, ...]
    bias: tuple[Any, ...] | None
    A_log: tuple[Any, ...]
    dt_bias: tuple[Any, ...]
    activation: str
    columns: int
    speculative: bool
    offered: tuple[Any, ...]


def refusal(
    layer: Any,
    dtype: torch.dtype,
    layout: str,
    speculative: bool,
    *,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> str:
    """Why a layer's prefill is left to the release; empty where the kernels take it.

    Args:
        layer: As `gdn_core.core` takes it.
        dtype: Of its inputs.
        layout: Of its states, `VK` or `KV`.
        speculative: Whether the batch has requests that verify drafts beside its prefill.
        conv_state: [slots, C, L].
        ssm_state: [slots, HV, V, K] or [slots, HV, K, V].
    """
    offered = tuple(dispatch.candidates(name, ssm_state.device.type) for name in OPERATORS)
    key = (dtype, speculative, conv_state.stride(), ssm_state.stride(), offered)
    known = _verdicts.setdefault(layer, {})
    if key not in known:
        bias = layer.conv1d.bias
        known[key] = _tried(
            Shapes(
                device=ssm_state.device,
                dtype=dtype,
                layout=layout,
                conv_state=_of_slots(conv_state),
                ssm_state=_of_slots(ssm_state),
                weight=_of(layer.conv1d.weight),
                bias=None if bias is None else _of(bias),
                A_log=_of(layer.A_log),
                dt_bias=_of(layer.dt_bias),
                activation=layer.activation,
                columns=layer.num_spec + 1,
                speculative=speculative,
                offered=offered,
            )
        )
    return known[key]


def warm(layer: Any, x: Tensor, layout: str) -> None:
    """Compile the kernels for a layer whose caches are not there yet.

    Args:
        layer: As `refusal` takes it.
        x: Any of its inputs, for dtype and device.
        layout: Of its states.
    """
    if layer in _verdicts:
        return
    (length, channels), state = layer.get_state_shape()
    conv_dtype, state_dtype = layer.get_state_dtype()
    made = {"device": x.device}
    for speculative in (False, True)[: 2 if layer.num_spec else 1]:
        reason = refusal(
            layer,
            x.dtype,
            layout,
            speculative,
            conv_state=torch.empty(1, length, channels, dtype=conv_dtype, **made).transpose(1, 2),
            ssm_state=torch.empty(1, *state, dtype=state_dtype, **made),
        )
        if reason:
            logger.info("GDN prefill: %s", reason)


def _of(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.dtype


def _of_slots(x: Tensor) -> tuple[Any, ...]:
    # How many there are is no matter of a kernel's.
    return tuple(x.shape[1:]), x.stride(), x.dtype


@cache
def _tried(shapes: Shapes) -> str:
    try:
        with dispatch.only(KERNELS):
            for requests in BATCHES[:2] if shapes.speculative else BATCHES:
                _run(shapes, requests)
    except NotImplementedError as error:
        return f"prefill runs the release's own kernels: {error}"
    except Exception as error:
        # A compiler's or a driver's, which no verifier foresees.
        logger.warning("a trial of the GDN kernels failed", exc_info=True)
        return f"prefill runs the release's own kernels: {type(error).__name__}: {error}"
    return ""


def _run(shapes: Shapes, requests: int) -> None:
    """One step on scratch memory."""
    lengths = (FIRST, *[OTHERS] * (requests - 1))
    tokens, device = sum(lengths), shapes.device
    drafts = shapes.columns if shapes.speculative else 0
    conv_state = _scratch(shapes.conv_state, device, requests + drafts)
    ssm_state = _scratch(shapes.ssm_state, device, requests + drafts)
    heads, *sizes = ssm_state.shape[1:]
    layer = SimpleNamespace(
        conv1d=SimpleNamespace(
            weight=_scratch(shapes.weight, device),
            bias=None if shapes.bias is None else _scratch(shapes.bias, device),
        ),
        A_log=_scratch(shapes.A_log, device),
        dt_bias=_scratch(shapes.dt_bias, device),
        activation=shapes.activation,
    )

    def made(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def filled(*shape: int) -> Tensor:
        # Not random: the host draws from the device's generator, and must draw what it would have.
        size = (tokens + drafts, *shape)
        return torch.linspace(-1, 1, prod(size), device=device).view(size).to(shapes.dtype)

    # As builders have it: a column of the block table, or rows of it that were picked.
    slots = made(*range(requests))
    if not drafts:
        slots = slots.unsqueeze(1).repeat(1, shapes.columns)[:, 0]
    metadata = SimpleNamespace(
        num_actual_tokens=tokens + drafts,
        num_prefills=requests,
        num_decodes=0,
        num_spec_decodes=int(shapes.speculative),
        non_spec_state_indices_tensor=slots,
        has_initial_state=slots > 0,
        spec_sequence_masks=made(*[0] * requests, 1, dtype=torch.bool) if drafts else None,
        spec_token_indx=made(*range(tokens, tokens + drafts), dtype=torch.int64),
        non_spec_token_indx=made(*range(tokens), dtype=torch.int64),
        spec_state_indices_tensor=made(*range(requests, requests + drafts)).unsqueeze(0),
        spec_query_start_loc=made(0, drafts),
        num_accepted_tokens=made(1),
    )
    starts = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
    setattr(metadata, gdn_metadata.ATTRIBUTE, build_chunk_metadata(starts, device))
    core(
        layer,
        filled(conv_state.shape[1]),
        filled(heads),
        filled(heads),
        filled(heads, sizes[0] if shapes.layout == "VK" else sizes[1]),
        metadata,
        conv_state=conv_state,
        ssm_state=ssm_state,
        state_layout=shapes.layout,
    )
    # A kernel's fault must come up here, and not in a request.
    torch.get_device_module(device).synchronize()


def _scratch(like: tuple[Any, ...], device: torch.device, slots: int = 0) -> Tensor:
    shape, strides, dtype = like
    size = (slots, *shape) if slots else shape
    return torch.empty_strided(size, strides, dtype=dtype, device=device).zero_()

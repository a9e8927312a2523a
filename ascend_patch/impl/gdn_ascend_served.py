"""Whether the bundled kernels serve a step, asked before the first of them writes to a cache.

On an NPU a reference is no answer: it reads device memory, and the release's own code is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import ChunkMetadata, chunk, conv

REFERENCE = "reference"


def refusal(operator: str, device: torch.device, call: object) -> str:
    """Why no kernel takes a call; empty where one does. On a CPU a reference is one."""
    choice = dispatch.select(operator, device.type, call)
    found = choice.implementation
    if found is not None and (device.type == "cpu" or found.name != REFERENCE):
        return ""
    return f"{operator} on {device.type}: {choice.reason or 'no kernel is offered'}"


def chunk_call(
    mixed: Tensor,
    out: Tensor,
    beta_dtype: torch.dtype,
    chunks: ChunkMetadata,
    state: Tensor,
    state_layout: str,
    indices: Tensor | None,
    carried: Tensor | None,
) -> chunk.Call:
    """A call of chunk_gated_delta_rule as a layer makes it, without memory.

    Args:
        mixed: [T, C], what the convolution returns; only its shape and dtype count.
        out: [T, HV, V].
        beta_dtype: Of the gates.
        chunks: The batch.
        state: The cache, [slots, HV, V, K] or [slots, HV, K, V].
        state_layout: `VK` or `KV`.
        indices, carried: Of the sequences, as the operator takes them.
    """
    tokens, heads, size = out.shape
    key_size = state.shape[-1 if state_layout == "VK" else -2]
    keys = (mixed.shape[1] - heads * size) // 2
    rows = torch.empty(mixed.shape, dtype=mixed.dtype, device="meta")
    q, k, v = rows.split((keys, keys, heads * size), dim=-1)
    shape = (keys // key_size, key_size)
    gates = (
        torch.empty(tokens, heads, dtype=dtype, device="meta")
        for dtype in (torch.float32, beta_dtype)
    )
    g, beta = gates
    return chunk.Call(
        q=q.unflatten(-1, shape),
        k=k.unflatten(-1, shape),
        v=v.unflatten(-1, (heads, size)),
        g=g,
        beta=beta,
        scale=key_size**-0.5,
        out=out,
        metadata=chunks,
        initial=state,
        final=state,
        state_indices=indices,
        has_initial_state=carried,
        state_layout=state_layout,
        normalise=True,
    )


def conv_call(
    mixed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    chunks: ChunkMetadata,
    conv_state: Tensor,
    indices: Tensor | None,
    carried: Tensor | None,
) -> conv.Call:
    """A call of causal_conv1d as a layer makes it; nothing is computed.

    Args:
        mixed: [T, C].
        weight: [C, W].
        bias: [C] or None.
        silu: Whether sums are activated.
        chunks: The batch.
        conv_state: The cache, [slots, C, L].
        indices, carried: Of the sequences, as the operator takes them.
    """
    return conv.Call(
        x=mixed,
        weight=weight,
        bias=bias,
        silu=silu,
        conv_state=conv_state,
        state_indices=indices,
        has_initial_state=carried,
        metadata=chunks,
        starts=chunks.cu_seqlens,
        out=torch.empty(mixed.shape, dtype=mixed.dtype, device="meta"),
        fill=True,
    )

"""What a GDN layer computes between its projections, on the bundled kernels alone.

Convolution, gates and the gated delta rule, for a batch of any kind, as `_forward_core` of vLLM's
layers does it. Both caches are read and written where they lie: no state is gathered, scattered or
transposed, and no device memory is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_metadata
from ascend_patch.kernels.gdn import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    fused_gating,
    recurrent_gated_delta_rule,
)


@dataclass(frozen=True)
class _Layer:
    """A layer's parameters and caches.

    Attributes:
        layer: The host's: conv1d (weight [C, 1, W]), activation, A_log and dt_bias [HV].
        conv_state: [slots, C, W - 1 or more].
        ssm_state: [slots, HV, V, K] or [slots, HV, K, V].
        state_layout: `VK` or `KV`.
    """

    layer: Any
    conv_state: Tensor
    ssm_state: Tensor
    state_layout: str

    @property
    def conv(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight [C, W] and bias."""
        return self.layer.conv1d.weight.flatten(1), self.layer.conv1d.bias

    def split(self, mixed: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """[T, C] -> q and k [1, T, H, K], v [1, T, HV, V], all of them views."""
        key_size = self.ssm_state.shape[-1 if self.state_layout == "VK" else -2]
        keys = (mixed.shape[1] - heads * size) // 2
        q, k, v = mixed.unsqueeze(0).split((keys, keys, heads * size), dim=-1)
        shape = (keys // key_size, key_size)
        return q.unflatten(-1, shape), k.unflatten(-1, shape), v.unflatten(-1, (heads, size))


def core(
    layer: Any,
    mixed_qkv: Tensor,
    b: Tensor,
    a: Tensor,
    core_attn_out: Tensor,
    metadata: Any,
    *,
    conv_state: Tensor,
    ssm_state: Tensor,
    state_layout: str,
) -> None:
    """Write what `_forward_core` of a GDN layer returns for one step; update its caches.

    Args:
        layer: Qwen3NextGatedDeltaNet of vLLM 0.11.1 to 0.18, GatedDeltaNetAttention of 0.19, or one
            with their conv1d, activation, A_log and dt_bias.
        mixed_qkv: [T, C], queries, keys and values beside each other; C = 2 H K + HV V.
        b, a: [T, HV], inputs of the gates.
        core_attn_out: [T, HV, V]; rows of this step's tokens are written, others left alone.
        metadata: GDNAttentionMetadata. With prefill it needs the chunk tables of
            `gdn_metadata.attach`.
        conv_state: The cache of the convolution's inputs, [slots, C, L], any strides.
        ssm_state: The cache of states, [slots, HV, V, K] or [slots, HV, K, V].
        state_layout: `VK` or `KV`, which of the two.

    Raises:
        RuntimeError: A batch has prefill, but its metadata no chunk tables.
        NotImplementedError: A kernel does not take this call; the message says why.

    Source: Qwen3-Next's layer; Gated Delta Networks, arXiv:2412.06464, section 3.3.
    """
    tokens = metadata.num_actual_tokens
    mixed, b, a, out = mixed_qkv[:tokens], b[:tokens], a[:tokens], core_attn_out[:tokens]
    own = _Layer(layer, conv_state, ssm_state, state_layout)
    if metadata.spec_sequence_masks is None:
        _rest(own, mixed, b, a, out, metadata)
    elif metadata.num_prefills == 0 and metadata.num_decodes == 0:
        _speculative(own, mixed, b, a, out, metadata)
    else:
        for part, index in (
            (_speculative, metadata.spec_token_indx),
            (_rest, metadata.non_spec_token_indx),
        ):
            result = torch.empty((index.numel(), *out.shape[1:]), dtype=out.dtype, device=a.device)
            its_mixed, its_b, its_a = (x.index_select(0, index) for x in (mixed, b, a))
            part(own, its_mixed, its_b, its_a, result, metadata)
            out.index_copy_(0, index.long(), result)


def _rest(own: _Layer, mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, metadata: Any) -> None:
    """Requests that verify no drafts: prefill, with one-token requests beside it, or decode."""
    if metadata.num_prefills > 0:
        _prefill(own, mixed, b, a, out, metadata)
    elif metadata.num_decodes > 0:
        _decode(own, mixed, b, a, out, metadata)


def _prefill(own: _Layer, mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, metadata: Any) -> None:
    chunks = gdn_metadata.of(metadata)
    if chunks is None:
        raise RuntimeError(
            "a GDN batch with prefill has no chunk tables: its metadata was made by another "
            "builder than the one that gdn_attn patches; run without ASCEND_PATCHES=gdn_attn"
        )
    given: dict[str, Any] = {
        "state_indices": metadata.non_spec_state_indices_tensor,
        "has_initial_state": metadata.has_initial_state,
        "chunk_metadata": chunks,
    }
    mixed = causal_conv1d(
        mixed, *own.conv, activation=own.layer.activation, conv_state=own.conv_state, **given
    )
    g, beta = fused_gating(a, b, own.layer.A_log, own.layer.dt_bias)
    chunk_gated_delta_rule(
        *own.split(mixed, *out.shape[1:]),
        g,
        beta,
        state=own.ssm_state,
        state_layout=own.state_layout,
        use_qk_l2norm_in_kernel=True,
        out=out.unsqueeze(0),
        **given,
    )


def _decode(own: _Layer, mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, metadata: Any) -> None:
    """One token each."""
    indices = metadata.non_spec_state_indices_tensor[: mixed.shape[0]]
    mixed = causal_conv1d_update(
        mixed, own.conv_state, *own.conv, activation=own.layer.activation, state_indices=indices
    )
    _recurrent(own, mixed, b, a, out, state_indices=indices)


def _speculative(
    own: _Layer, mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, metadata: Any
) -> None:
    """Drafts and the token before them; a state for each, in a column of its own."""
    count = metadata.num_spec_decodes
    indices = metadata.spec_state_indices_tensor[:count]
    given = {"num_accepted_tokens": metadata.num_accepted_tokens[:count]}
    starts = metadata.spec_query_start_loc[: count + 1]
    mixed = causal_conv1d_update(
        mixed,
        own.conv_state,
        *own.conv,
        activation=own.layer.activation,
        state_indices=indices[:, 0],
        query_start_loc=starts,
        max_query_len=indices.shape[1],
        **given,
    )
    _recurrent(own, mixed, b, a, out, state_indices=indices, cu_seqlens=starts, **given)


def _recurrent(
    own: _Layer, mixed: Tensor, b: Tensor, a: Tensor, out: Tensor, **given: Tensor
) -> None:
    recurrent_gated_delta_rule(
        *own.split(mixed, *out.shape[1:]),
        state=own.ssm_state,
        state_layout=own.state_layout,
        a=a,
        b=b,
        A_log=own.layer.A_log,
        dt_bias=own.layer.dt_bias,
        use_qk_l2norm_in_kernel=True,
        out=out.unsqueeze(0),
        **given,
    )

"""GDN layers of vllm-ascend 0.13.0 and 0.18.0, in steps with prefill.

The release's own `_forward_core` gathers states, transposes and scatters them, and waits for the
device in every layer: 0.13.0's convolution 1 + 2N times for N sequences, 0.18.0's three times, and
`initial_state[~has_initial_state, ...] = 0` once, for torch_npu reads the zero back. Ours reads and
writes the cache where it lies. Steps without prefill, requests that verify drafts, and steps that
no kernel takes are the release's own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_ascend_served as served
from ascend_patch.impl import gdn_core, gdn_metadata
from ascend_patch.kernels.gdn import ChunkMetadata, chunk, chunk_gated_delta_rule, conv

QWEN3_NEXT = "vllm_ascend.patch.worker.patch_qwen3_next"
QWEN3_5 = "vllm_ascend.patch.worker.patch_qwen3_5"
PAD_SLOT = -1
KNOWN = "ascend_patch_known"


@dataclass(frozen=True)
class Rows:
    """Tokens of a step: mixed_qkv [T, C], b and a [T, HV], out [T, HV, V]."""

    mixed: Tensor
    b: Tensor
    a: Tensor
    out: Tensor

    def first(self, tokens: int) -> Rows:
        """Those of the batch, without what pads it."""
        mixed, b, a, out = (x[:tokens] for x in (self.mixed, self.b, self.a, self.out))
        return Rows(mixed, b, a, out)


@dataclass(frozen=True)
class Prefill:
    """A layer's step with prefill.

    Attributes:
        cache: The layer's two: the convolution's inputs [slots, L, C], as the runner allocates
            them, and the states in their layout, [slots, HV, V, K] or [slots, HV, K, V].
        indices: int32 [N], slots of the sequences that verify no drafts, adjacent in memory.
        carried: bool [N], which have a state.
    """

    layer: Any
    metadata: Any
    chunks: ChunkMetadata
    cache: tuple[Tensor, Tensor]
    indices: Tensor
    carried: Tensor
    state_layout: str

    @property
    def conv_weight(self) -> Tensor:
        """[C, W]."""
        weight: Tensor = self.layer.conv1d.weight.flatten(1)
        return weight

    def no_chunk(self, rows: Rows) -> str:
        """Why no kernel of the chunked rule takes it; empty where one does."""
        call = served.chunk_call(
            rows.mixed, rows.out, rows.b.dtype, self.chunks, self.cache[1], self.state_layout,
            self.indices, self.carried,
        )  # fmt: skip
        return served.refusal(chunk.OPERATOR, rows.mixed.device, call)

    def no_conv(self, rows: Rows) -> str:
        """The same of the convolution."""
        call = served.conv_call(
            rows.mixed, self.conv_weight, self.layer.conv1d.bias, bool(self.layer.activation),
            self.chunks, self.cache[0].transpose(-1, -2), self.indices, self.carried,
        )  # fmt: skip
        return served.refusal(conv.OPERATOR, rows.mixed.device, call)


Part = Callable[[Prefill, Rows], None]
Refusal = Callable[[Prefill, Rows], str]


def qwen3_next_0_13(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`_forward_core` of 0.13.0, whose states are [K, V]."""

    def refusal(step: Prefill, rows: Rows) -> str:
        return step.no_chunk(rows) or step.no_conv(rows)

    _forward_core(wrapped, instance, _rows(*args, **kwargs), "KV", refusal, _bundled)


def qwen3_next_0_18(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`_forward_core` of 0.18.0, Qwen3-Next, whose states are [V, K]."""
    rows = _rows(*args, **kwargs)
    _forward_core(wrapped, instance, rows, "VK", Prefill.no_chunk, _with_ascendc)


def qwen3_5_0_18(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
    """`_forward_core` of 0.18.0, Qwen3.5: states [K, V] in a cache that says [V, K]."""

    def part(step: Prefill, rows: Rows) -> None:
        _with_ascendc(step, rows)
        if step.metadata.spec_sequence_masks is None:
            # Once a layer; where drafts are verified too, the release does it with them.
            importlib.import_module(QWEN3_5).maybe_save_kv_layer_to_connector("", [])

    rows = _rows(*args, **kwargs)
    _forward_core(wrapped, instance, rows, "KV", Prefill.no_chunk, part)


def _forward_core(
    wrapped: Any,
    layer: Any,
    rows: Rows,
    state_layout: str,
    refusal: Refusal,
    part: Part,
) -> None:
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    step = _step(layer, context, state_layout)
    if step is None or not _is_served(step, rows, refusal):
        wrapped(rows.mixed, rows.b, rows.a, rows.out)
        return
    metadata = step.metadata
    rows = rows.first(metadata.num_actual_tokens)
    if metadata.spec_sequence_masks is None:
        part(step, rows)
        return
    _choose(rows, metadata.non_spec_token_indx, lambda chosen: part(step, chosen))

    def drafts(chosen: Rows) -> None:
        alone = copy.copy(metadata)
        alone.num_prefills = alone.num_prefill_tokens = 0
        alone.num_decodes = alone.num_decode_tokens = 0
        alone.num_actual_tokens = len(chosen.mixed)
        with _instead(context.attn_metadata, layer.prefix, alone):
            wrapped(chosen.mixed, chosen.b, chosen.a, chosen.out)

    _choose(rows, metadata.spec_token_indx, drafts)


def _rows(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor) -> Rows:
    return Rows(mixed_qkv, b, a, core_attn_out)


def _step(layer: Any, context: Any, state_layout: str) -> Prefill | None:
    """The layer's step; None if it is none with prefill, or has no chunk tables."""
    if not isinstance(context.attn_metadata, dict):
        return None
    metadata = context.attn_metadata[layer.prefix]
    chunks = gdn_metadata.of(metadata)
    if chunks is None or metadata.num_prefills <= 0:
        return None
    conv_state, ssm_state = layer.kv_cache[getattr(context, "virtual_engine", 0)]
    sizes = (layer.head_k_dim, layer.head_v_dim)
    # 0.18.0's Qwen3.5 keeps [K, V] in a cache whose shape says [V, K]: the order is the memory's.
    ssm_state = ssm_state.view(
        *ssm_state.shape[:2], *(sizes if state_layout == "KV" else reversed(sizes))
    )
    indices = metadata.non_spec_state_indices_tensor.contiguous()
    carried = metadata.has_initial_state
    return Prefill(layer, metadata, chunks, (conv_state, ssm_state), indices, carried, state_layout)


def _is_served(step: Prefill, rows: Rows, refusal: Refusal) -> bool:
    """Asked once a step: its layers look alike, and those that do not have sizes of their own."""
    known = _of_step(step.metadata)
    key = (step.cache[1].shape[1:], rows.mixed.shape[1], rows.mixed.dtype, step.state_layout)
    if key not in known:
        reason = refusal(step, rows)
        known[key] = not reason
        if reason:
            gdn_metadata.left(f"prefill of some layers is the release's own: {reason}")
    return bool(known[key])


def _of_step(metadata: Any) -> dict[Any, Any]:
    """What the step's first layer finds out for the others."""
    found: dict[Any, Any] = metadata.__dict__.setdefault(KNOWN, {})
    return found


def _choose(rows: Rows, index: Tensor, part: Callable[[Rows], None]) -> None:
    """Compute some of a step's tokens as if they were alone."""
    mixed, b, a = (x.index_select(0, index) for x in (rows.mixed, rows.b, rows.a))
    result = torch.empty(
        (len(index), *rows.out.shape[1:]), dtype=rows.out.dtype, device=rows.out.device
    )
    part(Rows(mixed, b, a, result))
    rows.out.index_copy_(0, index.long(), result)


@contextlib.contextmanager
def _instead(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before, table[name] = table[name], value
    try:
        yield
    finally:
        table[name] = before


def _bundled(step: Prefill, rows: Rows) -> None:
    """On the bundled kernels alone."""
    batch = SimpleNamespace(
        num_actual_tokens=len(rows.mixed),
        num_prefills=step.metadata.num_prefills,
        num_decodes=step.metadata.num_decodes,
        spec_sequence_masks=None,
        non_spec_state_indices_tensor=step.indices,
        has_initial_state=step.carried,
    )
    setattr(batch, gdn_metadata.ATTRIBUTE, step.chunks)
    gdn_core.core(
        step.layer,
        rows.mixed,
        rows.b,
        rows.a,
        rows.out,
        batch,
        conv_state=step.cache[0].transpose(-1, -2),
        ssm_state=step.cache[1],
        state_layout=step.state_layout,
    )


def _with_ascendc(step: Prefill, rows: Rows) -> None:
    """The release's convolution, an AscendC operator that takes lists, and its gates."""
    host, layer, metadata = importlib.import_module(QWEN3_5), step.layer, step.metadata
    mixed = torch.ops._C_ascend.npu_causal_conv1d_custom(
        rows.mixed,
        step.conv_weight.transpose(0, 1),
        conv_state=step.cache[0],
        bias_opt=layer.conv1d.bias,
        query_start_loc_opt=step.chunks.starts,
        cache_indices_opt=host.to_int64_tuple(metadata.non_spec_state_indices_tensor),
        initial_state_mode_opt=host.to_int64_tuple(metadata.has_initial_state),
        num_accepted_tokens_opt=[],
        activation_mode=1 if layer.activation else 0,
        pad_slot_id=PAD_SLOT,
        run_mode=0,
    )
    g, beta = host.fused_gdn_gating_patch(layer.A_log, rows.a, rows.b, layer.dt_bias)
    heads, size = rows.out.shape[1:]
    q, k, v = mixed.unsqueeze(0).split(
        ((mixed.shape[1] - heads * size) // 2,) * 2 + (heads * size,), dim=-1
    )
    keys = (-1, layer.head_k_dim)
    chunk_gated_delta_rule(
        q.unflatten(-1, keys),
        k.unflatten(-1, keys),
        v.unflatten(-1, (heads, size)),
        g,
        beta,
        state=step.cache[1],
        state_layout=step.state_layout,
        state_indices=step.indices,
        has_initial_state=step.carried,
        chunk_metadata=step.chunks,
        use_qk_l2norm_in_kernel=True,
        out=rows.out.unsqueeze(0),
    )

"""GDN metadata of vllm-ascend's builders, without a word from the device.

0.13.0 runs vLLM's own builder. 0.18.0 adds tables for its Triton kernels in two buffers taken in
turn, whatever the device has read of them so far, and too short for a batch with one request more
than max_num_seqs; its layers then read three tensors back, each in every layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ascend_patch.impl import gdn_ascend_blocks, gdn_metadata, gdn_vllm_build
from ascend_patch.kernels.gdn import ChunkMetadata
from ascend_patch.kernels.gdn.metadata import LARGE_BLOCK, cumsum_block

CHUNK = 64
HOST_VALUES = "ascend_patch_host_values"
PATCH_0_18 = "vllm_ascend.patch.worker.patch_gdn_attn"
VLLM_0_13 = gdn_vllm_build.Release(has_modes=False, finds_context=True, counts_empty=True)
VLLM_0_18 = gdn_vllm_build.Release(either=True)


def build_0_13(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`GDNAttentionMetadataBuilder.build` of vLLM 0.13.0."""
    del wrapped
    return gdn_vllm_build.build(VLLM_0_13, instance, *args, **kwargs)


def build_0_18(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`_patched_build`: vLLM's metadata, the tables of the release's kernels, and host values."""
    del wrapped
    block = cumsum_block(importlib.import_module(PATCH_0_18)._get_gdn_num_heads(instance))
    sizes = (CHUNK, LARGE_BLOCK, block)
    metadata = gdn_vllm_build.build(VLLM_0_18, instance, *args, chunk_sizes=sizes, **kwargs)
    metadata.non_spec_chunked_prefill_meta = None
    chunks = gdn_metadata.of(metadata)
    if chunks is None:
        return metadata
    metadata.non_spec_chunked_prefill_meta = _tables_0_18(chunks, block)
    if _is_sharded(instance):
        # Prompts are split over ranks, which only the release's own kernels know of.
        setattr(metadata, gdn_metadata.ATTRIBUTE, None)
        return metadata
    common, drafts = _batch(*args, **kwargs)
    speculative = gdn_metadata.drafting(drafts, use_spec_decode=instance.use_spec_decode)
    _know(metadata.non_spec_query_start_loc, chunks.starts)
    _know_states(metadata, instance, common, speculative)
    return metadata


def to_int64_tuple(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """`to_int64_tuple`: what a builder left on exactly this tensor, or else the device's."""
    del instance
    known = getattr((*args, *kwargs.values())[0], HOST_VALUES, None)
    found: tuple[int, ...] = wrapped(*args, **kwargs) if known is None else known
    return found


def _batch(
    common_prefix_len: int,
    common_attn_metadata: Any,
    num_accepted_tokens: Tensor | None = None,
    num_decode_draft_tokens_cpu: Tensor | None = None,
    fast_build: bool = False,
) -> tuple[Any, Tensor | None]:
    del common_prefix_len, num_accepted_tokens, fast_build
    return common_attn_metadata, num_decode_draft_tokens_cpu


def _tables_0_18(chunks: ChunkMetadata, block: int) -> Any:
    """Sequences keep their numbers: each of the release's kernels looks them up in cu_seqlens."""
    table = chunks.table(CHUNK)
    return importlib.import_module(PATCH_0_18).GDNChunkedPrefillMetadata(
        chunk_indices_chunk64=table.indices,
        chunk_offsets_chunk64=table.offsets,
        update_chunk_offsets_chunk64=table.update_offsets,
        final_chunk_indices_chunk64=table.final_indices,
        chunk_indices_large_block=chunks.table(LARGE_BLOCK).indices,
        block_indices_cumsum=chunks.table(block).indices,
    )


def _is_sharded(builder: Any) -> bool:
    return bool(
        getattr(builder.vllm_config.parallel_config, "prefill_context_parallel_size", 1) > 1
    )


def _know_states(metadata: Any, builder: Any, common: Any, speculative: Tensor | None) -> None:
    """Leave on the batch's tensors what the runner's own numbers say is in them."""
    # A property of that name in vLLM's class waits for the device; vllm-ascend's is a field.
    seq_lens = vars(common).get("seq_lens_cpu")
    if not isinstance(seq_lens, Tensor) or seq_lens.device.type != "cpu":
        return
    lengths = common.query_start_loc_cpu.diff()
    seq_lens = seq_lens[: len(lengths)]
    if len(seq_lens) != len(lengths):
        return
    rest = slice(None) if speculative is None else ~speculative
    _know(metadata.has_initial_state, (seq_lens > lengths)[rest].int().tolist())
    slots = gdn_ascend_blocks.slots(builder, common, lengths, seq_lens)
    if slots is not None:
        _know(metadata.non_spec_state_indices_tensor, slots[rest].tolist())


def _know(tensor: Tensor | None, values: Sequence[int]) -> None:
    if tensor is not None and tensor.shape == (len(values),):
        setattr(tensor, HOST_VALUES, tuple(values))

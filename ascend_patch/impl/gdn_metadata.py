"""Chunk tables of a GDN batch, carried by the host's own metadata from its builder to its layers.

Everything here is known to the scheduler, so nothing of it is read back from a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import left_to_host
from ascend_patch.kernels.gdn import ChunkMetadata, PinnedStaging, build_chunk_metadata

PATCH = "gdn_attn"
ATTRIBUTE = "ascend_patch_chunks"
CHUNK_SIZES = (64,)

# A builder's buffers, per device; they go when it goes. Every build takes a slot of its own, so two
# builds in a step, those of ubatches and of dummy runs cannot overwrite each other's.
_staging: weakref.WeakKeyDictionary[Any, dict[torch.device, PinnedStaging]] = (
    weakref.WeakKeyDictionary()
)


def drafting(
    num_decode_draft_tokens_cpu: Tensor | None, *, use_spec_decode: bool = True
) -> Tensor | None:
    """Which requests verify draft tokens in this step; None if none does.

    A host decides by the sum: requests with 0 drafts alone make no speculative batch, beside one
    with drafts they belong to it.

    Args:
        num_decode_draft_tokens_cpu: int32 [B] on the CPU, -1 for a request that does not decode.
        use_spec_decode: The builder's.

    Returns:
        bool [B] on the CPU, or None.
    """
    if not use_spec_decode or num_decode_draft_tokens_cpu is None:
        return None
    speculative = num_decode_draft_tokens_cpu >= 0
    drafts = int(num_decode_draft_tokens_cpu[speculative].sum())
    return speculative if drafts else None


def non_speculative(query_start_loc_cpu: Tensor, speculative: Tensor | None) -> Tensor:
    """Where the sequences begin that chunked kernels serve, as `non_spec_query_start_loc` has them.

    Args:
        query_start_loc_cpu: int32 [B + 1] on the CPU, requests that only pad the batch included.
        speculative: What `drafting` returned.

    Returns:
        int32 [N + 1] on the CPU, over the non-speculative requests in their order, empty ones kept.
    """
    if speculative is None:
        return query_start_loc_cpu
    lengths = query_start_loc_cpu.diff()[~speculative]
    starts = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=starts[1:])
    return starts


def attach(
    metadata: Any,
    builder: Any,
    query_start_loc_cpu: Tensor,
    device: torch.device,
    *,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
) -> ChunkMetadata | None:
    """Give a batch's metadata the chunk tables of its non-speculative sequences.

    Args:
        metadata: The host's GDNAttentionMetadata; its `num_prefills` is read, and the attribute
            `ascend_patch_chunks` set: the tables, or None for a batch without prefill.
        builder: The host's builder, which the staging buffers belong to.
        query_start_loc_cpu: int32 [N + 1] on the CPU, as `non_speculative` returns it. It may be
            the runner's own buffer: it is read before this returns.
        device: Where the layers run.
        chunk_sizes: In tokens.

    Returns:
        What was attached.
    """
    chunks = None
    if metadata.num_prefills > 0:
        try:
            chunks = build_chunk_metadata(
                query_start_loc_cpu,
                device,
                chunk_sizes=chunk_sizes,
                staging=staging_of(builder, device),
            )
        except ValueError as error:
            # A dummy run may leave an earlier batch's rows behind its own.
            left(f"prefill of a batch that has no chunk tables: {error}")
    setattr(metadata, ATTRIBUTE, chunks)
    return chunks


def of(metadata: Any) -> ChunkMetadata | None:
    """What `attach` gave it; None for metadata that no patched builder made."""
    return getattr(metadata, ATTRIBUTE, None)


def staging_of(builder: Any, device: torch.device) -> PinnedStaging | None:
    """The buffers of a builder for copies to a device; None where memory is the host's own."""
    if device.type == "cpu":
        return None
    buffers = _staging.setdefault(builder, {})
    if device not in buffers:
        buffers[device] = PinnedStaging(device)
    return buffers[device]


def left(reason: str) -> None:
    """Count a step or a layer that runs the release's own code; the patch's state says so."""
    left_to_host.count(PATCH, reason)

"""The prefill metadata of vllm-ascend 0.23.0's GDN builder.

Its layers read nothing back: what AscendC's kernels want on the host is made there. Left are
sequences without tokens, which pad a batch, or which a rank has none of where prompts are split
over ranks. The tables are numbered without them, Triton's kernels look their numbers up among all,
and so does the last of AscendC's; and a mask of those that remain makes the host count on the
device, twice in each layer.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_metadata
from ascend_patch.impl.gdn_vllm_parcel import Parcel
from ascend_patch.kernels.gdn import build_chunk_metadata
from ascend_patch.kernels.gdn.metadata import LARGE_BLOCK, cumsum_block

CHUNK = 64
MODULE = "vllm_ascend.ops.gdn_attn_builder"


def prefill_metadata(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """`_build_non_spec_chunked_prefill_metadata`."""
    del instance
    try:
        return _prefill_metadata(*args, **kwargs)
    except ValueError:
        # Of a dummy run's batch, which may not be one.
        return wrapped(*args, **kwargs)


def _prefill_metadata(builder: Any, cu_seqlens_cpu: Tensor, device: torch.device) -> Any:
    """Tables of all sequences for Triton, and lists without the empty ones for AscendC.

    States go from one to the other by the numbers of those that remain.
    """
    staging = gdn_metadata.staging_of(builder, device)
    block = cumsum_block(_heads(builder))
    sizes = (CHUNK, LARGE_BLOCK, block)
    chunks = build_chunk_metadata(cu_seqlens_cpu, device, chunk_sizes=sizes, staging=staging)
    lengths = cu_seqlens_cpu.diff()
    kept = (lengths > 0).nonzero()[:, 0]
    compact = (0, *(chunks.starts[n + 1] for n in kept.tolist()))
    counts = (-(-lengths[kept] // CHUNK)).tolist()
    pairs = tuple(x for n, count in enumerate(counts) for c in range(count) for x in (n, c))
    remaining = None
    if len(kept) < len(lengths):
        parcel = Parcel()
        parcel.put(kept.numpy())
        (remaining,) = parcel.send(device, staging)
    table = chunks.table(CHUNK)
    return importlib.import_module(MODULE).GDNChunkedPrefillMetadata(
        cu_seqlens_host=compact,
        chunk_indices_chunk64_host=pairs,
        chunk_indices_chunk64=table.indices,
        chunk_offsets_chunk64=table.offsets,
        update_chunk_offsets_chunk64=table.update_offsets,
        final_chunk_indices_chunk64=table.final_indices,
        chunk_indices_large_block=chunks.table(LARGE_BLOCK).indices,
        block_indices_cumsum=chunks.table(block).indices,
        num_decodes=int((lengths == 1).sum()),
        cu_seqlens_kern=None if remaining is None else compact,
        keep_meta=remaining,
    )


def _heads(builder: Any) -> int:
    config, parallel = builder.vllm_config.model_config, builder.vllm_config.parallel_config
    text = getattr(config, "hf_text_config", None)
    if text is not None and hasattr(text, "linear_num_value_heads"):
        heads: int = text.linear_num_value_heads // parallel.tensor_parallel_size
        return heads
    return int(config.get_num_attention_heads(parallel))

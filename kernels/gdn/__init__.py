"""Gated delta rule: the layers of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from ascend_patch.kernels.gdn.chunk import chunk_gated_delta_rule
from ascend_patch.kernels.gdn.conv import causal_conv1d, causal_conv1d_update
from ascend_patch.kernels.gdn.gated_norm import gated_rms_norm
from ascend_patch.kernels.gdn.gating import fused_gating
from ascend_patch.kernels.gdn.metadata import ChunkMetadata, ChunkTable, build_chunk_metadata
from ascend_patch.kernels.gdn.recurrent import recurrent_gated_delta_rule
from ascend_patch.kernels.gdn.staging import PinnedStaging

__all__ = [
    "ChunkMetadata",
    "ChunkTable",
    "PinnedStaging",
    "build_chunk_metadata",
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "fused_gating",
    "gated_rms_norm",
    "recurrent_gated_delta_rule",
]

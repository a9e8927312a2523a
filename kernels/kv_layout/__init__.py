"""KV caches between a prefill and a decode instance: who sends what, and how it is laid out."""

from __future__ import annotations

from ascend_patch.kernels.kv_layout import merge_triton
from ascend_patch.kernels.kv_layout.descriptors import (
    Descriptors,
    Pairs,
    descriptors,
    match_blocks,
)
from ascend_patch.kernels.kv_layout.geometry import PULL, PUSH, Run
from ascend_patch.kernels.kv_layout.merge import merge_head_shards_
from ascend_patch.kernels.kv_layout.plan import (
    Merge,
    Piece,
    Plan,
    Transfer,
    plan_transfers,
)
from ascend_patch.kernels.kv_layout.refusals import REFUSALS, Refusal, refuse
from ascend_patch.kernels.kv_layout.staged import Round, copy_staged, least_staging, staged_rounds
from ascend_patch.kernels.kv_layout.topology import HND, NHD, LayerGroup, Side, Topology

__all__ = [
    "HND",
    "NHD",
    "PULL",
    "PUSH",
    "REFUSALS",
    "Descriptors",
    "LayerGroup",
    "Merge",
    "Pairs",
    "Piece",
    "Plan",
    "Refusal",
    "Round",
    "Run",
    "Side",
    "Topology",
    "Transfer",
    "copy_staged",
    "descriptors",
    "least_staging",
    "match_blocks",
    "merge_head_shards_",
    "plan_transfers",
    "refuse",
    "staged_rounds",
]

merge_triton.register()

"""patch_gdn_attn in vllm-ascend's classes: what runs on an NPU.

The builders and layers are vLLM's classes with methods of vllm_ascend in them, so targets name the
method as vllm_ascend writes it and, with ``assigned_to``, where calls reach it. All of it writes to
caches, so VERIFY compares nothing; the kernels have their self-test.
"""

from __future__ import annotations

from ascend_patch._registry import Band, Target
from ascend_patch.patches._gdn_vllm import BUILDER_INIT

WORKER_PATCH = "vllm_ascend.patch.worker"
FLA = "vllm_ascend.ops.triton.fla"
BUILDER_0_23 = "vllm_ascend.ops.gdn_attn_builder"
IMPL = "ascend_patch.impl.gdn_ascend"
VLLM_GDN = "vllm.v1.attention.backends.gdn_attn"
VLLM_BUILD = f"{VLLM_GDN}:GDNAttentionMetadataBuilder.build"
VLLM_LAYER = "vllm.model_executor.models.qwen3_next:Qwen3NextGatedDeltaNet"
METADATA = (f"{VLLM_GDN}:GDNAttentionMetadata", f"{VLLM_GDN}:GDNAttentionMetadataBuilder.__init__")
# Who looks sequences up by the builders' tables.
READERS = tuple(
    f"{FLA}.{name}"
    for name in (
        "chunk:chunk_gated_delta_rule_fwd",
        "cumsum:chunk_local_cumsum_scalar",
        "solve_tril:solve_tril",
    )
)
RUNNER = "vllm_ascend.worker.model_runner_v1:NPUModelRunner"


# The module of the patch, the class in it, and the class of vLLM that has its methods.
QWEN3_NEXT = ("patch_qwen3_next", "AscendQwen3Next_GatedDeltaNet", VLLM_LAYER)
QWEN3_5 = (
    "patch_qwen3_5",
    "AscendQwen3_5GatedDeltaNet",
    "vllm.model_executor.models.qwen3_5:Qwen3_5GatedDeltaNet",
)


def _layer(replacement: str, module: str, own: str, theirs: str) -> Target:
    """`_forward_core`, which vllm_ascend writes in a class of its own and assigns to vLLM's."""
    return Target(
        symbol=f"{WORKER_PATCH}.{module}:{own}._forward_core",
        seam="host",
        replacement=f"{IMPL}:{replacement}",
        assigned_to=f"{theirs}._forward_core",
        context=(
            f"{WORKER_PATCH}.{module}:<module>",
            f"{VLLM_LAYER}.rearrange_mixed_qkv",
            f"{VLLM_LAYER}.get_state_shape",
        ),
    )


BUILD_0_18 = Target(
    symbol=f"{WORKER_PATCH}.patch_gdn_attn:_patched_build",
    seam="host",
    replacement=f"{IMPL}_metadata:build_0_18",
    assigned_to=VLLM_BUILD,
    context=(
        VLLM_BUILD,
        *METADATA,
        "vllm.v1.attention.backends.utils:mamba_get_block_table_tensor",
        f"{WORKER_PATCH}.patch_gdn_attn:<module>",
        f"{WORKER_PATCH}.patch_gdn_attn:GDNChunkedPrefillMetadata",
        f"{WORKER_PATCH}.patch_gdn_attn:_get_gdn_num_heads",
        f"{WORKER_PATCH}.patch_gdn_attn:_build_non_spec_query_start_loc_cpu",
        *READERS,
    ),
)
TABLES_0_23 = Target(
    symbol=f"{BUILDER_0_23}:_build_non_spec_chunked_prefill_metadata",
    seam="host",
    replacement=f"{IMPL}_0_23:prefill_metadata",
    context=(
        f"{BUILDER_0_23}:GDNChunkedPrefillMetadata",
        f"{BUILDER_0_23}:AscendGDNAttentionMetadataBuilder.build",
        *READERS,
    ),
)
# The rows of the host, which the runner copies to the device and clears behind the last request.
BLOCK_TABLES = Target(
    symbol="vllm_ascend.worker.block_table:BlockTable.__init__",
    seam="host",
    replacement=f"{IMPL}_blocks:remember",
    context=(
        "vllm_ascend.worker.block_table:BlockTable.commit_block_table",
        "vllm_ascend.worker.block_table:BlockTable.get_device_tensor",
        f"{RUNNER}._build_attention_metadata",
        f"{RUNNER}._prepare_inputs",
    ),
)
HOST_VALUES = Target(
    symbol=f"{WORKER_PATCH}.patch_qwen3_5:to_int64_tuple",
    seam="host",
    replacement=f"{IMPL}_metadata:to_int64_tuple",
)
BUILD_0_13 = Target(VLLM_BUILD, "host", f"{IMPL}_metadata:build_0_13", METADATA)
RULE_0_11 = Target(
    symbol="vllm_ascend.ops.fla:torch_chunk_gated_delta_rule",
    seam="host",
    replacement=f"{IMPL}_0_11:torch_chunk_gated_delta_rule",
    context=(
        "vllm_ascend.models.qwen3_next:CustomQwen3NextGatedDeltaNet._forward",
        f"{WORKER_PATCH}.patch_triton:<module>",
    ),
)

BANDS = (
    Band("vllm_ascend", "", ("0.23.0", "releases/v0.23.0"), (TABLES_0_23,)),
    Band(
        "vllm_ascend",
        "",
        ("0.18.0", "releases/v0.18.0"),
        (
            BUILDER_INIT,
            BUILD_0_18,
            BLOCK_TABLES,
            HOST_VALUES,
            _layer("qwen3_next_0_18", *QWEN3_NEXT),
            _layer("qwen3_5_0_18", *QWEN3_5),
        ),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.13.0", "releases/v0.13.0"),
        (BUILDER_INIT, BUILD_0_13, _layer("qwen3_next_0_13", *QWEN3_NEXT)),
    ),
    Band("vllm_ascend", "", ("0.11.0", "v0.11.0-dev"), (RULE_0_11,)),
)
UNTOUCHED = (
    "vllm_ascend, decode, captured graphs and requests that verify drafts, beside a prompt too: "
    "the release's own kernels and operators",
    "vllm_ascend, an NPU without Triton for Ascend, or with a kernel that its self-test withdrew: "
    "prefill is the release's own; 0.18.0 then reads the device once a layer, and not four times",
    "vllm_ascend 0.11.0: its layer and its convolution read from the device where each sequence "
    "begins and ends; the chunked rule between them is ours",
    "vllm_ascend 0.18.0, prompts that are split over ranks (prefill context parallel): its layers",
    "vllm_ascend 0.18.0, model runner v2: its block tables are on the device alone, and the "
    "convolution reads the slots from there",
    "vllm_ascend 0.23.0: its layers read nothing back; what is mended is its metadata of sequences "
    "without tokens",
    "vllm_ascend 0.11.0, prompts of one token in a batch that decodes: they go on from what the "
    "last owner has left in their slot, as in vLLM (in 0.13.0 and 0.18.0 this patch empties it)",
    "vllm_ascend, 310P: it runs classes of its own",
)

"""patch_attention_router in vllm-ascend's classes: what runs on an NPU."""

from __future__ import annotations

from ascend_patch._registry import Band, Target

ASCEND = "vllm_ascend.attention.attention_v1"
BASE = f"{ASCEND}:AscendAttentionBackendImpl"
C8 = f"{ASCEND}:AscendC8AttentionBackendImpl"
IMPL = "ascend_patch.impl.attention_ascend"

METADATA = (
    f"{ASCEND}:AscendAttentionState",
    f"{ASCEND}:AscendMetadata",
    f"{ASCEND}:AscendAttentionMetadataBuilder.build",
    f"{BASE}.__init__",
)
OPERATORS = (
    f"{BASE}.forward_impl",
    f"{BASE}.forward_fused_infer_attention",
    f"{BASE}.forward_paged_attention",
    f"{BASE}.reshape_and_cache",
    f"{BASE}.full_graph_fia",
    f"{BASE}._forward_encoder_attention",
    f"{BASE}._get_fia_params",
)
SLIDING = f"{BASE}._forward_fia_slidingwindow"


def _base(replacement: str, *context: str) -> Target:
    """The class that serves what has one rank's keys, in the model's own dtype."""
    return Target(f"{BASE}.forward", "host", f"{IMPL}{replacement}", context=(*METADATA, *context))


def _c8(replacement: str, *context: str) -> Target:
    """The class of layers whose cache is int8."""
    names = (
        "_prepare_c8_scales",
        "_quantize_kv_to_int8",
        "_dequant_paged_kv_to_dense",
        "_forward_c8_decode",
        "_forward_c8_chunked_prefill",
        "_forward_c8_fused_infer_attention",
    )
    return Target(
        f"{C8}.forward",
        "host",
        f"{IMPL}:{replacement}",
        context=(f"{ASCEND}:AscendMetadata", *(f"{C8}.{name}" for name in names), *context),
    )


BANDS = (
    Band(
        "vllm_ascend",
        "",
        ("0.23.0", "releases/v0.23.0"),
        (
            _base(":forward_0_23", *OPERATORS, f"{BASE}.update_graph_params"),
            _c8("forward_c8_0_23", f"{C8}._reshape_and_cache"),
        ),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.18.0", "releases/v0.18.0"),
        (_base(":forward_0_18", *OPERATORS, SLIDING), _c8("forward_c8")),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.13.0", "releases/v0.13.0"),
        (_base(":forward_0_13", *OPERATORS, SLIDING),),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.11.0", "v0.11.0-dev"),
        (
            _base(
                "_0_11:forward",
                f"{BASE}._forward_prefill_no_cache",
                f"{BASE}._forward_prefill_cache_hit",
                f"{BASE}._forward_decode_only",
                f"{BASE}._forward_v1_style",
            ),
        ),
    ),
)

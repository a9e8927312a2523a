"""The symbols of vLLM that the patches replace or rely on, in every recorded release.

A table maps a module to names; behind `Class:` come methods of that class, up to the next one, and
`<module>` is what importing the module runs. Modules move between releases: where a release has no
such symbol, its record says so.
"""

from __future__ import annotations

from collections.abc import Mapping


def symbols(table: Mapping[str, str]) -> tuple[str, ...]:
    """A table as `module:qualname`, in the order it is written."""
    found: list[str] = []
    for module, names in table.items():
        owner = ""
        for name in names.split():
            if name.endswith(":"):
                owner = name[:-1] + "."
            else:
                found.append(f"{module}:{owner}{name}")
    return tuple(found)


LAYERS = "vllm.model_executor.layers"
MODELS = "vllm.model_executor.models"
ROPE = f"{LAYERS}.rotary_embedding"
BACKENDS = "vllm.v1.attention.backends"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"

ROTARY = symbols(
    {
        ROPE: "get_rope",
        f"{ROPE}.base": """
            RotaryEmbeddingBase: __init__ _compute_inv_freq _compute_cos_sin_cache
                _match_cos_sin_cache_dtype get_cos_sin
            RotaryEmbedding: __init__ _compute_cos_sin_cache _match_cos_sin_cache_dtype
                forward_static forward_native forward_cpu forward_cuda forward_hip forward_xpu""",
        f"{ROPE}.common": """
            rotate_neox rotate_gptj apply_rotary_emb_torch apply_rotary_emb_dispatch
            ApplyRotaryEmb: __init__ _pre_process _post_process forward_static forward_native
                forward_cpu forward_cuda forward_hip forward_xpu""",
        f"{ROPE}.mrope": """
            triton_mrope apply_interleaved_rope _mrope_apply
            MRotaryEmbedding: __init__ _compute_inv_freq _compute_cos_sin_cache forward_native
                forward_cpu forward_cuda forward_hip forward_xpu""",
        f"{ROPE}.yarn_scaling_rope": """
            YaRNScalingRotaryEmbedding: __init__ _compute_inv_freq _compute_cos_sin_cache""",
        f"{ROPE}.llama3_rope": "Llama3RotaryEmbedding: __init__ _compute_inv_freq",
        f"{ROPE}.deepseek_scaling_rope": """
            DeepseekScalingRotaryEmbedding: __init__ _compute_cos_sin_cache forward_static
                forward_native forward_cuda forward_hip""",
        f"{MODELS}.qwen2_vl": """
            apply_rotary_emb_torch apply_rotary_pos_emb_vision
            Qwen2VisionAttention: __init__ forward""",
        f"{MODELS}.qwen2_5_vl": "Qwen2_5_VisionAttention: __init__ forward",
        f"{MODELS}.qwen3": "Qwen3Attention: __init__ forward",
        f"{MODELS}.qwen3_moe": "Qwen3MoeAttention: __init__ forward",
        f"{MODELS}.qwen3_next": "Qwen3NextAttention: __init__ forward",
        "vllm.model_executor.custom_op": """
            CustomOp: __new__ __init__ dispatch_forward forward_oot register_oot""",
    }
)

SELECTOR = "AttentionSelectorConfig get_attn_backend _cached_get_attn_backend"
REGISTRY = "AttentionBackendEnum MambaAttentionBackendEnum register_backend"
BACKEND = "AttentionType AttentionBackend AttentionImpl"
METADATA = "CommonAttentionMetadata AttentionMetadataBuilder subclass_attention_backend"
ATTENTION = "Attention: __init__ forward get_attn_backend get_kv_cache_spec"
ENCODER_ONLY = """
    create_encoder_only_attention_backend EncoderOnlyAttention: __init__ get_kv_cache_spec"""

ATTENTION_ROUTER = symbols(
    {
        # The selection, and the classes that every backend implements.
        "vllm.attention.selector": SELECTOR,
        "vllm.v1.attention.selector": f"{SELECTOR} get_attn_spec_kind",
        "vllm.attention.backends.registry": REGISTRY,
        f"{BACKENDS}.registry": REGISTRY,
        "vllm.attention.backends.abstract": BACKEND,
        "vllm.v1.attention.backend": f"{BACKEND} {METADATA}",
        f"{BACKENDS}.utils": f"""
            {METADATA} split_decodes_and_prefills get_kv_cache_layout
            get_supported_kv_cache_layouts""",
        "vllm.attention.layer": f"unified_attention unified_attention_with_output {ATTENTION}",
        f"{LAYERS}.attention.attention": f"""
            get_attention_context unified_attention_with_output unified_kv_cache_update
            {ATTENTION}""",
        "vllm.attention.layers.encoder_only_attention": ENCODER_ONLY,
        f"{LAYERS}.attention.encoder_only_attention": ENCODER_ONLY,
        # What the emulated backend stands beside, and where it is selected.
        "vllm.platforms.cpu": "CpuPlatform: get_attn_backend_cls",
        "vllm.platforms.interface": "_Backend Platform: get_attn_backend_cls",
        f"{BACKENDS}.cpu_attn": """
            TorchSDPABackend TorchSDPAMetadata CPUAttentionBackend CPUAttentionMetadata
            TorchSDPAMetadataBuilderV1: __init__ reorder_batch build
            TorchSDPABackendImpl: __init__ forward
            CPUAttentionMetadataBuilder: __init__ build
            CPUAttentionBackendImpl: __init__ forward do_kv_cache_update""",
    }
)

CHUNK_OPERATORS = {
    "chunk": """
        chunk_gated_delta_rule chunk_gated_delta_rule_fwd ChunkGatedDeltaRuleFunction: forward""",
    "chunk_delta_h": "chunk_gated_delta_rule_fwd_h",
    "chunk_o": "chunk_fwd_o",
    "chunk_scaled_dot_kkt": "chunk_scaled_dot_kkt_fwd",
    "cumsum": "chunk_local_cumsum chunk_local_cumsum_scalar chunk_local_cumsum_vector",
    "fused_recurrent": """
        fused_recurrent_gated_delta_rule fused_recurrent_gated_delta_rule_packed_decode""",
    "fused_sigmoid_gating": "fused_sigmoid_gating_delta_rule_update",
    "index": "prepare_lens prepare_chunk_indices prepare_chunk_offsets",
    "solve_tril": "solve_tril",
    "utils": "tensor_cache input_guard",
    "wy_fast": "recompute_w_u_fwd",
}
# Releases up to 0.25 have the first, later ones the second.
CHUNK_PACKAGES = (f"{LAYERS}.fla.ops", "vllm.third_party.flash_linear_attention.ops")

GDN_ATTN = symbols(
    {
        f"{BACKENDS}.gdn_attn": """
            GDNAttentionBackend GDNAttentionMetadata
            GDNAttentionMetadataBuilder: __init__ build build_for_cudagraph_capture
                _build_chunk_metadata _check_chunk_metadata_override _stage_spec_decode
                _stage_decode update_block_table""",
        f"{BACKENDS}.utils": "compute_causal_conv1d_metadata mamba_get_block_table_tensor",
        f"{MODELS}.qwen3_next": """
            gdn_attention gdn_attention_core fused_gdn_gating fi_chunk_gated_delta_rule
            ChunkGatedDeltaRule: __init__ forward_cuda forward_native
            Qwen3NextGatedDeltaNet: __init__ forward _forward _forward_core
                _forward_core_decode_non_spec _warmup_prefill_kernels rearrange_mixed_qkv
                get_state_dtype get_state_shape""",
        f"{MODELS}.qwen3_5": """
            Qwen3_5GatedDeltaNet: fix_query_key_value_ordering create_qkvz_proj forward""",
        f"{LAYERS}.mamba.gdn.base": "GatedDeltaNetAttention: __init__ get_state_dtype",
        f"{LAYERS}.mamba.gdn.qwen_gdn_linear_attn": """
            qwen_gdn_attention_core fused_gdn_gating fi_chunk_gated_delta_rule
            ChunkGatedDeltaRule: __init__ forward_cuda forward_native
            QwenGatedDeltaNetAttention: __init__ forward forward_cuda forward_cpu _forward_core
                _forward_core_decode_non_spec _warmup_prefill_kernels rearrange_mixed_qkv
                get_state_shape""",
        f"{LAYERS}.mamba.ops.causal_conv1d": "causal_conv1d_fn causal_conv1d_update",
        **{
            f"{package}.{module}": names
            for package in CHUNK_PACKAGES
            for module, names in CHUNK_OPERATORS.items()
        },
        # What keeps a GDN model from running on a CPU.
        f"{LAYERS}.utils": "dispatch_cpu_unquantized_gemm",
        "vllm.platforms.cpu": """
            CpuPlatform: check_and_update_config update_block_size_for_backend""",
        "vllm.v1.worker.utils": "KVBlockZeroer: __init__ init_meta zero_block_ids",
        "vllm.v1.worker.mamba_utils": "batch_memcpy",
    }
)

# Common to both modules that vLLM has had for its Mooncake connector.
MOONCAKE = """
    MooncakeConnectorMetadata SendBlockMeta group_concurrent_contiguous
    get_mooncake_side_channel_port"""
MOONCAKE_CLASSES = """
    MooncakeConnector: __init__ get_num_new_matched_tokens update_state_after_alloc
        build_connector_meta request_finished register_kv_caches get_finished start_load_kv
        wait_for_layer_load save_kv_layer wait_for_save
    MooncakeConnectorScheduler: __init__ get_num_new_matched_tokens update_state_after_alloc
        build_connector_meta request_finished
    MooncakeConnectorWorker: __init__ shutdown _sender_worker send_kv_to_decode _send_blocks
        register_kv_caches fetch_finished_recving_reqs get_finished receive_kv start_load_kv"""

KV_CONNECTOR = symbols(
    {
        f"{CONNECTOR}.factory": """
            KVConnectorFactory: register_connector create_connector get_connector_class
                get_connector_class_by_name _get_connector_class_with_compat""",
        f"{CONNECTOR}.utils": """
            TpKVTopology TransferTopology KVOutputAggregator: __init__ aggregate""",
        f"{CONNECTOR}.v1.base": """
            KVConnectorBase_V1 SupportsHMA
            KVConnectorBase_V1: __init__ get_finished get_block_ids_with_load_errors
                get_required_kvcache_layout""",
        f"{CONNECTOR}.v1.mooncake_connector": f"""
            MooncakeAgentMetadata RecvReqMeta SendReqMeta FinishedSendReqSet
            FinishedReceiveReqSet {MOONCAKE} {MOONCAKE_CLASSES} _receiver_loop _mooncake_sender
            group_kv_pull""",
        f"{CONNECTOR}.v1.mooncake.mooncake_connector": f"""
            MooncakeXferMetadata MooncakeXferResponse MooncakeXferResponseStatus PullReqMeta
            TransferRegion {MOONCAKE} get_mooncake_bootstrap_addr should_launch_bootstrap_server
            _get_tp_ratio _compute_sender_transfer_plan _validate_asymmetric_region_lengths
            {MOONCAKE_CLASSES} register_worker_with_bootstrap _mooncake_sender_listener
            resolve_need_send _build_transfer_params fetch_finished_sending_reqs
            receive_kv_from_single_worker process_pulling_result _connect_to_prefiller_bootstrap
            handle_new_engine_id _start_load_kv record_send_reqs _producer_cache_is_replicated
            _get_transfer_regions _get_sender_transfer_plan get_block_ids_with_load_errors""",
        f"{CONNECTOR}.v1.mooncake.mooncake_utils": "MooncakeBootstrapServer",
        # Who reads what a connector reports.
        "vllm.v1.worker.kv_connector_model_runner_mixin": """
            KVConnectorModelRunnerMixin: kv_connector_no_forward maybe_get_kv_connector_output
                _get_kv_connector_output""",
        "vllm.v1.outputs": "KVConnectorOutput",
        "vllm.v1.core.sched.scheduler": """
            Scheduler: _connector_finished _update_waiting_for_remote_kv
                _update_from_kv_xfer_finished _update_requests_with_invalid_blocks
                _handle_invalid_blocks""",
    }
)

"""The symbols of vllm-ascend that the patches replace or rely on, in every recorded release."""

from __future__ import annotations

from ascend_patch.patches._watch import symbols

OPERATORS = "vllm_ascend.ops"
ROPE = f"{OPERATORS}.rotary_embedding"
FUSED_ROPE = f"{OPERATORS}.triton.linearnorm"
WORKER_PATCH = "vllm_ascend.patch.worker"
RUNNER = "vllm_ascend.worker.model_runner_v1"

ROTARY = symbols(
    {
        ROPE: """
            _custom_rotary_embedding_enabled _rope_forward_oot rope_forward_oot get_rope_dim
            set_cos_and_sin get_cos_and_sin_mla get_cos_and_sin_slice update_cos_sin
            _record_cos_sin_cache _record_cos_and_sin_cache _record_cos_and_sin_cache_interleaved
            AscendRotaryEmbedding: __init__ forward_oot
            AscendYaRNRotaryEmbedding: __init__ forward_oot
            AscendDeepseekScalingRotaryEmbedding: __init__ _set_cos_sin_cache forward
            AscendMRotaryEmbedding: forward_oot forward_triton
            AscendApplyRotaryEmb: __init__ forward_oot""",
        "vllm_ascend.ops.triton.rope": """
            _triton_rope rope_forward_triton _triton_rope_siso rope_forward_triton_siso""",
        "vllm_ascend.ops.register_custom_ops": "<module> _rope_forward_oot_impl_fake",
        f"{FUSED_ROPE}.split_qkv_rmsnorm_rope": """
            <module> split_qkv_rmsnorm_rope_impl split_qkv_rmsnorm_rope_impl_fake
            split_qkv_rmsnorm_rope_kernel""",
        f"{FUSED_ROPE}.split_qkv_rmsnorm_mrope": """
            <module> triton_split_qkv_rmsnorm_mrope triton_split_qkv_rmsnorm_mrope_fake
            split_qkv_rmsnorm_mrope_kernel""",
        f"{FUSED_ROPE}.split_qkv_tp_rmsnorm_rope": """
            <module> split_qkv_tp_rmsnorm_rope_impl split_qkv_tp_rmsnorm_rope_impl_fake""",
        "vllm_ascend.compilation.passes.base_pattern": "BasePattern: __init__ register",
        "vllm_ascend.compilation.passes.qknorm_rope_fusion_pass": """
            QKNormRopeFusionPattern: __init__ get_inputs register get_pattern get_replacement
            QKNormRopeFusionPatternWithBias: __init__ get_inputs register get_pattern
                get_replacement
            QKNormRopeFusionPass: __init__ __call__ is_applicable_for_range""",
        f"{WORKER_PATCH}.patch_rope": "<module> AscendRotaryEmbeddingBase: get_cos_sin",
        f"{WORKER_PATCH}.patch_qwen3vl": "<module> forward_with_split_qkv_rmsnorm_mrope",
        f"{WORKER_PATCH}.patch_qwen3_5": "<module> AscendQwen3NextAttention: forward",
        f"{WORKER_PATCH}.patch_minimax_m2": "<module> _patch_forward",
        "vllm_ascend._310p.ops.rotary_embedding": """
            _rope_forward_oot AscendRotaryEmbedding310: forward_oot""",
        "vllm_ascend.utils": "register_ascend_customop",
    }
)

ATTENTION_ROUTER = symbols(
    {
        "vllm_ascend.attention.attention_v1": """
            AscendAttentionBackend AscendAttentionState AscendMetadata
            AscendAttentionMetadataBuilder: __init__ reorder_batch build build_for_graph_capture
                get_cudagraph_support
            AscendAttentionBackendImpl: __init__ forward forward_impl
                forward_fused_infer_attention forward_paged_attention
                _forward_encoder_attention _forward_fia_slidingwindow _forward_prefill_no_cache
                _forward_prefill_cache_hit _forward_decode_only _forward_v1_style _get_fia_params
                full_graph_fia full_graph_pa update_graph_params reshape_and_cache
                process_weights_after_loading
            AscendC8AttentionBackendImpl: forward _prepare_c8_scales _quantize_kv_to_int8
                _dequant_paged_kv_to_dense _forward_c8_decode _forward_c8_chunked_prefill
                _forward_c8_fused_infer_attention""",
        "vllm_ascend.attention.attention_mask": """
            _generate_attn_mask
            AttentionMaskBuilder: __init__ get_attn_mask get_attention_mask get_pooling_mask
                get_splitfuse_attn_mask get_swa_mask""",
        "vllm_ascend.attention.utils": """
            AscendCommonAttentionMetadata split_decodes_and_prefills using_paged_attention
            enable_cp""",
        "vllm_ascend.attention.context_parallel.attention_cp": """
            AscendAttentionCPMetadataBuilder: __init__ build
            AscendAttentionCPImpl: __init__ forward_impl reshape_and_cache _forward_prefill_cp
                _forward_decode_pcp_dcp update_graph_params""",
        "vllm_ascend.compilation.acl_graph": """
            GraphParams set_graph_params get_graph_params update_graph_params_workspaces
            update_attn_params update_full_graph_params _update_attn_pa_params
            _update_attn_fia_params update_attn_dcp_pcp_params _pad_attention_seq_params
            ACLGraphWrapper: __init__ __call__""",
        "vllm_ascend.quantization.methods.kv_c8": """
            AscendC8KVCacheAttentionMethod: __init__ create_weights process_weights_after_loading
                apply""",
        "vllm_ascend._310p.attention.attention_v1": """
            AscendAttentionBackend310
            AscendAttentionBackendImpl310: forward_impl forward_paged_attention
                forward_prefill_310 forward_chunked_prefill_310""",
        "vllm_ascend.platform": "NPUPlatform: get_attn_backend_cls",
        f"{WORKER_PATCH}.patch_attention_layer": "<module> forward",
        f"{WORKER_PATCH}.patch_selector": "<module> AttentionSelectorConfig get_attn_backend",
        "vllm_ascend.patch.platform.patch_selector": """
            <module> AttentionSelectorConfig get_attn_backend""",
    }
)

CHUNK_OPERATORS = {
    "chunk": """
        chunk_gated_delta_rule chunk_gated_delta_rule_fwd ChunkGatedDeltaRuleFunction: forward""",
    "chunk_delta_h": "chunk_gated_delta_rule_fwd_h",
    "chunk_delta_hupdate": "chunk_gated_delta_rule_fwd_hupdate",
    "chunk_o": "chunk_fwd_o",
    "chunk_o_update": "chunk_fwd_o_update",
    "chunk_scaled_dot_kkt": "chunk_scaled_dot_kkt_fwd",
    "cumsum": "chunk_local_cumsum chunk_local_cumsum_scalar",
    "fused_qkvzba_split_reshape": "fused_qkvzba_split_reshape_cat",
    "sigmoid_gating": "fused_sigmoid_gating_delta_rule_update",
    "solve_tril": "solve_tril",
    "utils": """
        prepare_lens prepare_chunk_indices prepare_chunk_offsets prepare_final_chunk_indices
        prepare_update_chunk_offsets""",
    "wy_fast": "recompute_w_u_fwd",
}

GDN_ATTN = symbols(
    {
        f"{WORKER_PATCH}.patch_gdn_attn": """
            <module> _patched_build GDNChunkedPrefillMetadata _GDNChunkedPrefillBufferSlot
            _prepare_chunk_counts_cpu _fill_chunk_indices_cpu _fill_chunk_offsets_cpu
            _fill_update_chunk_offsets_cpu _fill_final_chunk_indices_cpu _get_gdn_num_heads
            _allocate_chunked_prefill_slot _ensure_chunk_meta_state
            _build_non_spec_query_start_loc_cpu _build_non_spec_chunked_prefill_meta_cpu
            _build_non_spec_chunked_prefill_meta""",
        f"{WORKER_PATCH}.patch_qwen3_next": """
            <module> AscendQwen3Next_GatedDeltaNet: forward _forward_core""",
        f"{WORKER_PATCH}.patch_qwen3_5": """
            <module> to_int64_tuple AscendQwen3_5GatedDeltaNet: forward _forward_core""",
        f"{WORKER_PATCH}.patch_triton": "<module>",
        f"{WORKER_PATCH}.patch_mamba_utils": "<module> batch_memcpy",
        "vllm_ascend.models.qwen3_next": """
            CustomQwen3NextGatedDeltaNet: __init__ _forward get_state_dtype get_state_shape""",
        f"{OPERATORS}.fla": "torch_chunk_gated_delta_rule",
        f"{OPERATORS}.casual_conv1d": """
            causal_conv1d_ref causal_conv1d_fn causal_conv1d_update_npu""",
        f"{OPERATORS}.sigmoid_gating": "fused_recurrent_gated_delta_rule",
        f"{OPERATORS}.triton.mamba.causal_conv1d": """
            causal_conv1d_ref causal_conv1d_fn causal_conv1d_update_npu""",
        f"{OPERATORS}.triton.fused_gdn_gating": "fused_gdn_gating_patch",
        **{f"{OPERATORS}.triton.fla.{module}": names for module, names in CHUNK_OPERATORS.items()},
        "vllm_ascend._310p.ops.fla.chunk_gated_delta_rule": "chunk_gated_delta_rule_pytorch",
    }
)

# What the modules share that have held the connector.
MOONCAKE = """
    MooncakeAgentMetadata ReqMeta MooncakeConnectorMetadata
    group_concurrent_contiguous string_to_int64_hash ensure_zmq_send ensure_zmq_recv SizedDict
    get_prefill_pp_indices
    KVCacheTaskTracker: __init__ add_not_transfer_request update_done_task_count
        get_and_clear_finished_requests add_delayed_request _retrieve_expired_requests
    KVCacheSendingThread: __init__ get_and_clear_finished_requests add_not_transfer_request
        add_delayed_request run
    KVCacheRecvingThread: __init__ add_request get_and_clear_finished_requests run
        _handle_request _cat_kv_cache _get_remote_metadata _send_done_recv_signal
        _get_remote_socket _return_remote_socket
    MooncakeConnector: __init__ get_num_new_matched_tokens update_state_after_alloc
        build_connector_meta register_kv_caches get_finished start_load_kv wait_for_layer_load
        save_kv_layer wait_for_save
    MooncakeConnectorScheduler: __init__ get_num_new_matched_tokens update_state_after_alloc
        build_connector_meta
    MooncakeConnectorWorker: __init__ _get_prefill_decode_size register_kv_caches get_finished
        start_load_kv"""
# What came with 0.13.
MOONCAKE_RANKS = """
    KVCacheTaskTracker: add_req_to_process
    KVCacheSendingThread: run_busy_loop
    KVCacheRecvingThread: _send_done_signal_to_free_remote_port reformat_kv_cache _nz_kv_cache
    MooncakeConnector: get_handshake_metadata set_xfer_handshake_metadata
    MooncakeConnectorScheduler: set_xfer_handshake_metadata
    MooncakeConnectorWorker: _get_kv_split_metadata _get_remote_host_info_by_port
        _prefill_get_remote_rank _get_remote_rank _get_remote_tp_ranks _get_remote_ranks_for_req"""
MOONCAKE_ONE_GROUP = """
    KVCacheRecvingThread: _transfer_kv_cache
    MooncakeConnector: request_finished
    MooncakeConnectorScheduler: request_finished"""
TRANSFER_ENGINE = "GlobalTE: __init__ get_transfer_engine register_buffer"

KV_CONNECTOR = symbols(
    {
        "vllm_ascend.distributed.mooncake_connector": f"""
            {MOONCAKE} {MOONCAKE_RANKS} {MOONCAKE_ONE_GROUP}
            KVCacheTaskTracker: _remove_delayed_requests
            KVCacheRecvingThread: _transpose_kv_cache_between_head
            MooncakeConnectorWorker: _initialize _register _prefill_get_remote_tp_rank
                _get_remote_tp_rank _get_remote_tp_ranks_for_req""",
        "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector": f"""
            RemotePortInfo {MOONCAKE} {MOONCAKE_RANKS} {MOONCAKE_ONE_GROUP}
            KVCacheRecvingThread: _transfer_kv_cache_all_groups reformat_kv_cache_with_fused_op
            MooncakeConnector: request_finished_all_groups
            MooncakeConnectorWorker: _get_tp_num_need_pulls""",
        # On releases/v0.13.0 it replaces the first where USE_MULTI_BLOCK_POOL is set.
        "vllm_ascend.distributed.mooncake_state_connector": f"""
            {MOONCAKE} {MOONCAKE_RANKS}
            KVCacheRecvingThread: _transfer_kv_cache_groups
            MooncakeConnector: request_finished_all_groups
            MooncakeConnectorScheduler: request_finished_all_groups
            MooncakeConnectorWorker: get_layer_idx""",
        "vllm_ascend.distributed": "register_connector",
        "vllm_ascend.distributed.kv_transfer": "register_connector",
        "vllm_ascend.distributed.mooncake_transfer_engine": TRANSFER_ENGINE,
        "vllm_ascend.distributed.kv_transfer.utils.mooncake_transfer_engine": TRANSFER_ENGINE,
        # Who reads what a connector reports.
        RUNNER: """
            NPUModelRunner: execute_model sample_tokens _pool kv_connector_no_forward
                maybe_setup_kv_connector maybe_wait_for_kv_save get_finished_kv_transfer""",
    }
)

"""patch_kv_connector in vllm-ascend 0.23.0, which reports what was not loaded itself."""

from __future__ import annotations

from ascend_patch._registry import Target

OURS = "ascend_patch.impl.kv_ascend"
MOONCAKE = "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector"


def _targets() -> tuple[Target, ...]:
    receiving, sending = f"{MOONCAKE}:KVCacheRecvingThread", f"{MOONCAKE}:KVCacheSendingThread"
    scheduler = f"{MOONCAKE}:MooncakeConnectorScheduler"
    worker = f"{MOONCAKE}:MooncakeConnectorWorker"

    def ours(symbol: str, replacement: str, *context: str) -> Target:
        return Target(symbol, "host", f"{OURS}{replacement}", context=context)

    return (
        ours(
            f"{receiving}._transfer_kv_cache_all_groups",
            "_0_23:transfer_kv_cache_all_groups",
            f"{receiving}._handle_request",
        ),
        ours(
            f"{receiving}.get_and_clear_finished_requests",
            "_0_23:finished_recving",
            f"{worker}.get_finished",
        ),
        ours(f"{receiving}._get_remote_socket", "_sockets:get_remote_socket"),
        ours(
            f"{sending}.__init__",
            "_said:sending_init",
            f"{MOONCAKE}:MooncakeAgentMetadata",
        ),
        ours(
            f"{MOONCAKE}:zmq_ctx",
            "_listener:zmq_ctx",
            f"{sending}.run",
            f"{sending}.run_busy_loop",
            f"{MOONCAKE}:KVCacheTaskTracker.add_delayed_request",
            f"{MOONCAKE}:KVCacheTaskTracker.add_req_to_process",
        ),
        ours(
            f"{scheduler}.get_num_new_matched_tokens",
            "_admit:get_num_new_matched_tokens",
            f"{MOONCAKE}:ReqMeta",
        ),
        ours(
            f"{scheduler}.request_finished",
            "_kept:request_finished",
            f"{MOONCAKE}:KVCacheTaskTracker._retrieve_expired_requests",
        ),
        ours(
            f"{scheduler}.build_connector_meta",
            "_kept:build_connector_meta",
            f"{scheduler}.update_state_after_alloc",
        ),
        ours(
            f"{worker}.register_kv_caches",
            "_0_23:register_kv_caches",
            f"{receiving}.__init__",
            f"{receiving}._get_remote_metadata",
        ),
        ours(
            f"{worker}.start_load_kv",
            "_0_23:start_load_kv",
            f"{receiving}.add_request",
            f"{receiving}._mark_failed_recv_request",
            f"{receiving}._clear_failed_recv_request",
            f"{worker}._get_remote_ranks_for_req",
            f"{worker}._get_remote_tp_ranks",
            f"{worker}._get_remote_host_info_by_port",
            f"{worker}._get_tp_num_need_pulls",
            f"{MOONCAKE}:ReqMeta",
            f"{MOONCAKE}:MooncakeConnectorMetadata",
        ),
    )


TARGETS = _targets()

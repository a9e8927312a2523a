"""patch_kv_connector in vllm-ascend 0.11.0, whose vLLM has no blocks that were not loaded."""

from __future__ import annotations

from ascend_patch._registry import Target

OURS = "ascend_patch.impl.kv_ascend"
MOONCAKE = "vllm_ascend.distributed.mooncake_connector"
RUNNER = "vllm_ascend.worker.model_runner_v1:NPUModelRunner"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
RECOMPUTE = "vllm_ascend.core.recompute_scheduler:RecomputeScheduler"
OLDER = f"{OURS}_0_11"


def _targets() -> tuple[Target, ...]:
    receiving, sending = f"{MOONCAKE}:KVCacheRecvingThread", f"{MOONCAKE}:KVCacheSendingThread"
    scheduler = f"{MOONCAKE}:MooncakeConnectorScheduler"
    worker = f"{MOONCAKE}:MooncakeConnectorWorker"
    tracker = f"{MOONCAKE}:KVCacheTaskTracker"

    def ours(symbol: str, replacement: str, *context: str) -> Target:
        return Target(symbol, "host", replacement, context=context)

    return (
        ours(
            f"{receiving}._transfer_kv_cache",
            f"{OURS}:transfer_kv_cache",
            f"{receiving}.__init__",
            f"{receiving}._handle_request",
            f"{receiving}.add_request",
        ),
        ours(
            f"{receiving}.get_and_clear_finished_requests",
            f"{OLDER}:finished_recving",
            f"{tracker}.update_done_task_count",
            f"{tracker}.get_and_clear_finished_requests",
            f"{worker}.get_finished",
        ),
        ours(f"{receiving}._get_remote_metadata", f"{OURS}_peers:get_remote_metadata"),
        ours(
            f"{receiving}._get_remote_socket",
            f"{OURS}_sockets:get_remote_socket",
            f"{receiving}._return_remote_socket",
        ),
        ours(
            f"{sending}.__init__",
            f"{OLDER}:sending_init",
            f"{MOONCAKE}:MooncakeAgentMetadata",
        ),
        ours(
            f"{MOONCAKE}:zmq_ctx",
            f"{OURS}_listener:zmq_ctx",
            f"{sending}.run",
            f"{tracker}.add_delayed_request",
        ),
        ours(
            f"{scheduler}.get_num_new_matched_tokens",
            f"{OURS}_admit:get_num_new_matched_tokens",
            f"{MOONCAKE}:ReqMeta",
        ),
        ours(f"{receiving}._send_done_recv_signal", f"{OLDER}:send_done_recv_signal"),
        ours(f"{MOONCAKE}:ensure_zmq_recv", f"{OURS}_peers:ensure_zmq_recv"),
        ours(
            f"{scheduler}.request_finished",
            f"{OURS}_kept:request_finished",
            f"{tracker}._retrieve_expired_requests",
        ),
        ours(
            f"{scheduler}.build_connector_meta",
            f"{OURS}_kept:build_connector_meta",
            f"{scheduler}.update_state_after_alloc",
        ),
        ours(f"{worker}.register_kv_caches", f"{OLDER}:register_kv_caches", f"{worker}.__init__"),
        ours(
            f"{worker}.start_load_kv",
            f"{OLDER}:start_load_kv",
            f"{worker}._get_remote_tp_ranks_for_req",
            f"{MOONCAKE}:ReqMeta",
            f"{MOONCAKE}:MooncakeConnectorMetadata",
        ),
        ours(f"{RUNNER}.get_finished_kv_transfer", f"{OLDER}:get_finished_kv_transfer"),
        ours(
            "vllm.distributed.kv_transfer.kv_connector.utils:KVOutputAggregator.aggregate",
            f"{OLDER}:aggregate",
            "vllm.v1.outputs:KVConnectorOutput",
        ),
        *(
            ours(f"{one}.{name}", f"{OLDER}:{name.removeprefix('_')}")
            for one in (SCHEDULER, RECOMPUTE)
            for name in ("_update_from_kv_xfer_finished", "_update_waiting_for_remote_kv")
        ),
    )


TARGETS = _targets()

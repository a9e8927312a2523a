"""patch_kv_connector in vllm-ascend's classes: MooncakeConnectorV1, in which decode pulls."""

from __future__ import annotations

from ascend_patch._registry import Band, Target
from ascend_patch.patches._kv_ascend_0_11 import TARGETS as TARGETS_0_11
from ascend_patch.patches._kv_ascend_0_23 import TARGETS as TARGETS_0_23
from ascend_patch.patches._kv_vllm import FAILS as VLLM_FAILS

OURS = "ascend_patch.impl.kv_ascend"
MOONCAKE_0_13 = "vllm_ascend.distributed.mooncake_connector"
MOONCAKE_0_18 = "vllm_ascend.distributed.kv_transfer.kv_p2p.mooncake_connector"
BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
RUNNER = "vllm_ascend.worker.model_runner_v1:NPUModelRunner"


def _targets(module: str, *more: str) -> tuple[Target, ...]:
    """What both releases have.

    Args:
        more: Of the worker: what computes its ranks there.
    """
    receiving, sending = f"{module}:KVCacheRecvingThread", f"{module}:KVCacheSendingThread"
    worker = f"{module}:MooncakeConnectorWorker"
    scheduler = f"{module}:MooncakeConnectorScheduler"

    def ours(symbol: str, replacement: str, *context: str) -> Target:
        return Target(symbol, "host", f"{OURS}{replacement}", context=context)

    return (
        ours(
            f"{receiving}._transfer_kv_cache",
            ":transfer_kv_cache",
            f"{receiving}.__init__",
            f"{receiving}._handle_request",
            f"{receiving}.add_request",
        ),
        ours(
            f"{receiving}.get_and_clear_finished_requests",
            ":finished_recving",
            f"{module}:KVCacheTaskTracker.update_done_task_count",
            f"{module}:KVCacheTaskTracker.get_and_clear_finished_requests",
            f"{worker}.get_finished",
        ),
        ours(f"{receiving}._get_remote_metadata", "_peers:get_remote_metadata"),
        ours(
            f"{receiving}._get_remote_socket",
            "_sockets:get_remote_socket",
            f"{receiving}._return_remote_socket",
        ),
        ours(
            f"{receiving}._send_done_recv_signal",
            "_peers:send_done_recv_signal",
            f"{receiving}._send_done_signal_to_free_remote_port",
        ),
        ours(f"{module}:ensure_zmq_recv", "_peers:ensure_zmq_recv"),
        ours(
            f"{sending}.__init__",
            "_said:sending_init",
            f"{module}:MooncakeAgentMetadata",
        ),
        ours(
            f"{module}:zmq_ctx",
            "_listener:zmq_ctx",
            f"{sending}.run",
            f"{sending}.run_busy_loop",
            f"{module}:KVCacheTaskTracker.add_delayed_request",
            f"{module}:KVCacheTaskTracker.add_req_to_process",
        ),
        ours(
            f"{scheduler}.get_num_new_matched_tokens",
            "_admit:get_num_new_matched_tokens",
            f"{module}:ReqMeta",
        ),
        ours(
            f"{scheduler}.request_finished",
            "_kept:request_finished",
            f"{module}:KVCacheTaskTracker._retrieve_expired_requests",
        ),
        ours(
            f"{scheduler}.build_connector_meta",
            "_kept:build_connector_meta",
            f"{scheduler}.update_state_after_alloc",
        ),
        ours(f"{worker}.__init__", "_sizes:worker_init"),
        ours(f"{worker}._get_prefill_decode_size", "_sizes:get_prefill_decode_size"),
        ours(
            f"{worker}._get_remote_ranks_for_req",
            "_sizes:get_remote_ranks_for_req",
            f"{worker}._get_remote_tp_ranks",
        ),
        ours(f"{worker}.register_kv_caches", ":register_kv_caches"),
        ours(
            f"{worker}.start_load_kv",
            ":start_load_kv",
            f"{worker}._get_remote_host_info_by_port",
            f"{module}:string_to_int64_hash",
            f"{module}:ReqMeta",
            f"{module}:MooncakeConnectorMetadata",
            *(f"{worker}.{name}" for name in more),
        ),
        ours(f"{BASE}.get_block_ids_with_load_errors", ":load_errors"),
        *(one for one in VLLM_FAILS if "Scheduler" in one.symbol),
    )


RUNNER_0_13 = Target(
    f"{RUNNER}.sample_tokens",
    "host",
    f"{OURS}:sample_tokens",
    context=(f"{RUNNER}.execute_model", f"{RUNNER}.get_finished_kv_transfer"),
)

# Its scheduler gives the blocks of an aborted request to others, though a rank pulls to them.
ABORTED_0_13 = Target(
    "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished",
    "host",
    f"{OURS}_admit:update_from_kv_xfer_finished",
)

BANDS = (
    Band(
        "vllm_ascend",
        "",
        ("0.18.0", "releases/v0.18.0"),
        _targets(MOONCAKE_0_18, "_get_tp_num_need_pulls"),
    ),
    Band(
        "vllm_ascend",
        "",
        ("0.13.0", "releases/v0.13.0"),
        (*_targets(MOONCAKE_0_13), RUNNER_0_13, ABORTED_0_13),
    ),
    Band("vllm_ascend", "", ("0.11.0", "v0.11.0-dev"), TARGETS_0_11),
    Band("vllm_ascend", "", ("0.23.0", "releases/v0.23.0"), TARGETS_0_23),
)
UNTOUCHED = (
    "vllm_ascend, decode TP above prefill TP: caches in the NZ format, under context parallel, "
    "quantised or of several kinds are refused when a server starts",
    "vllm_ascend 0.11.0: decode TP above prefill TP, which the release refuses when it starts; "
    "whether prefill is what decode's configuration says",
    "vllm_ascend 0.23.0: decode TP above prefill TP, which the release refuses when it starts; a "
    "pull is not tried again",
    "vllm_ascend, ranks under context parallel (PCP, DCP), quantised caches and models with "
    "several kinds of cache: they are not checked; of the last, failures are not reported either, "
    "for their vLLM's scheduler takes one list of blocks",
    "vllm_ascend: the layerwise and hybrid Mooncake connectors, AscendStore, UCM, and "
    "mooncake_state_connector (USE_MULTI_BLOCK_POOL on releases/v0.13.0)",
)

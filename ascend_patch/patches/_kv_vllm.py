"""patch_kv_connector in vLLM's own classes: MooncakeConnector, in which prefill pushes."""

from __future__ import annotations

from ascend_patch._registry import Band, Target

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
BASE = f"{CONNECTOR}.v1.base"
MOONCAKE = f"{CONNECTOR}.v1.mooncake.mooncake_connector"
BOOTSTRAP = f"{CONNECTOR}.v1.mooncake.mooncake_utils"
WORKER, SCHEDULER = f"{MOONCAKE}:MooncakeConnectorWorker", f"{MOONCAKE}:MooncakeConnectorScheduler"
CORE = "vllm.v1.core.sched.scheduler:Scheduler"
OURS = "ascend_patch.impl.kv_vllm"


def _worker(name: str, replacement: str, *context: str) -> Target:
    return Target(f"{WORKER}.{name}", "host", f"{OURS}:{replacement}", context=context)


def _core(name: str, replacement: str, *context: str) -> Target:
    target = f"{OURS}_scheduler:{replacement}"
    return Target(f"{CORE}.{name}", "host", target, context=tuple(f"{CORE}.{n}" for n in context))


# A transfer that fails: from the worker to the scheduler, and what it makes of it.
FAILS = (
    Target(
        f"{BASE}:KVConnectorBase_V1.get_block_ids_with_load_errors",
        "host",
        f"{OURS}:load_errors",
        context=(
            "vllm.v1.worker.kv_connector_model_runner_mixin:"
            "KVConnectorModelRunnerMixin._get_kv_connector_output",
        ),
    ),
    _core("_handle_invalid_blocks", "handle_invalid_blocks", "_update_from_kv_xfer_finished"),
)


# 0.16 to 0.18: each is replaced or wrapped for both roles.
PUSHES = (
    _worker(
        "__init__",
        "worker_init",
        f"{MOONCAKE}:MooncakeXferMetadata",
        f"{MOONCAKE}:MooncakeXferResponse",
        f"{MOONCAKE}:MooncakeXferResponseStatus",
        f"{WORKER}.shutdown",
    ),
    _worker(
        "register_kv_caches",
        "register_kv_caches",
        f"{CONNECTOR}.utils:TpKVTopology",
        f"{WORKER}._mooncake_sender_listener",
        f"{WORKER}.register_worker_with_bootstrap",
    ),
    _worker(
        "send_kv_to_decode",
        "send_kv_to_decode",
        f"{MOONCAKE}:SendBlockMeta",
        f"{WORKER}._sender_worker",
        f"{WORKER}._build_transfer_params",
        f"{WORKER}.fetch_finished_sending_reqs",
    ),
    _worker("_send_blocks", "send_blocks"),
    _worker("record_send_reqs", "record_send_reqs", f"{MOONCAKE}:MooncakeConnectorMetadata"),
    _worker(
        "_start_load_kv",
        "start_load_kv",
        f"{MOONCAKE}:PullReqMeta",
        f"{WORKER}.start_load_kv",
        f"{WORKER}.fetch_finished_recving_reqs",
    ),
    # What it asks for is context of the two above.
    Target(f"{WORKER}.get_finished", "host", f"{OURS}_finished:get_finished"),
    Target(
        f"{SCHEDULER}.update_state_after_alloc",
        "host",
        f"{OURS}_scheduler:update_state_after_alloc",
        context=(f"{SCHEDULER}.get_num_new_matched_tokens", f"{SCHEDULER}.request_finished"),
    ),
    Target(f"{SCHEDULER}.build_connector_meta", "host", f"{OURS}_scheduler:build_connector_meta"),
    FAILS[0],
    _core("_handle_invalid_blocks", "recompute_elsewhere", "_update_waiting_for_remote_kv"),
    _core("_update_from_kv_xfer_finished", "update_from_kv_xfer_finished"),
    Target(
        f"{BOOTSTRAP}:MooncakeBootstrapServer.start",
        "host",
        f"{OURS}:bootstrap_start",
        context=(f"{BOOTSTRAP}:MooncakeBootstrapServer",),
    ),
)

# 0.13 to 0.15: equal sizes alone, and a failure is said.
EARLY = f"{CONNECTOR}.v1.mooncake_connector"
EARLY_WORKER = f"{EARLY}:MooncakeConnectorWorker"
EARLY_SCHEDULER = f"{EARLY}:MooncakeConnectorScheduler"


def _early(symbol: str, *context: str) -> Target:
    return Target(symbol, "host", f"{OURS}_early:{symbol.rpartition('.')[2]}", context=context)


REFUSES = (
    Target(f"{EARLY_WORKER}.__init__", "host", f"{OURS}_early:worker_init"),
    _early(f"{EARLY_SCHEDULER}.request_finished"),
    _early(f"{EARLY_SCHEDULER}.build_connector_meta", f"{EARLY}:MooncakeConnectorMetadata"),
    _early(f"{EARLY_WORKER}.group_kv_pull", f"{EARLY_WORKER}.start_load_kv"),
    _early(
        f"{EARLY_WORKER}.receive_kv",
        f"{EARLY}:MooncakeAgentMetadata",
        f"{EARLY_WORKER}.fetch_finished_recving_reqs",
    ),
    _early(f"{EARLY_WORKER}.send_kv_to_decode", f"{EARLY_WORKER}._sender_worker"),
    *FAILS,
)

# 0.19 to 0.29: they have any TP to any TP, and one mistake.
SHARES = tuple(
    Target(f"{MOONCAKE}:{symbol}", "host", f"{OURS}_shares:{replacement}", context=context)
    for symbol, replacement, context in (
        (
            "_compute_sender_transfer_plan",
            "sender_transfer_plan",
            (
                f"{MOONCAKE}:_get_tp_ratio",
                f"{WORKER}._producer_cache_is_replicated",
                f"{WORKER}._get_sender_transfer_plan",
            ),
        ),
        ("_validate_asymmetric_region_lengths", "region_lengths", ()),
    )
)

BANDS = (
    Band("vllm", ">=0.13,<0.16", ("0.13.0", "0.14.1", "0.15.1"), REFUSES),
    Band("vllm", ">=0.16,<0.19", ("0.16.0", "0.17.0", "0.18.0"), PUSHES),
    Band(
        "vllm",
        ">=0.19,<0.30",
        ("0.19.1", "0.20.2", "0.22.1", "0.23.0", "0.25.1", "0.26.0", "0.27.1", "0.29.0"),
        SHARES,
    ),
    Band(
        "vllm",
        ">=0.30",
        retired="vLLM's own connector sends the first replica of each KV head (its #52516)",
    ),
)

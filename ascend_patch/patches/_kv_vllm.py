"""patch_kv_connector in vLLM's own classes: MooncakeConnector, in which prefill pushes."""

from __future__ import annotations

from ascend_patch._registry import Band, Target

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
BASE = f"{CONNECTOR}.v1.base"
MOONCAKE = f"{CONNECTOR}.v1.mooncake.mooncake_connector"
BOOTSTRAP = f"{CONNECTOR}.v1.mooncake.mooncake_utils"
WORKER, SCHEDULER = f"{MOONCAKE}:MooncakeConnectorWorker", f"{MOONCAKE}:MooncakeConnectorScheduler"
OURS = "ascend_patch.impl.kv_vllm"


def _worker(name: str, replacement: str, *context: str) -> Target:
    return Target(f"{WORKER}.{name}", "host", f"{OURS}:{replacement}", context=context)


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
        f"{WORKER}._send_blocks",
        f"{WORKER}.fetch_finished_sending_reqs",
    ),
    _worker("record_send_reqs", "record_send_reqs", f"{MOONCAKE}:MooncakeConnectorMetadata"),
    _worker(
        "_start_load_kv",
        "start_load_kv",
        f"{MOONCAKE}:PullReqMeta",
        f"{WORKER}.start_load_kv",
        f"{WORKER}.get_finished",
        f"{WORKER}.fetch_finished_recving_reqs",
    ),
    Target(
        f"{SCHEDULER}.update_state_after_alloc",
        "host",
        f"{OURS}_scheduler:update_state_after_alloc",
        context=(f"{SCHEDULER}.get_num_new_matched_tokens", f"{SCHEDULER}.request_finished"),
    ),
    Target(f"{SCHEDULER}.build_connector_meta", "host", f"{OURS}_scheduler:build_connector_meta"),
    Target(
        f"{BASE}:KVConnectorBase_V1.get_block_ids_with_load_errors",
        "host",
        f"{OURS}:load_errors",
        context=(
            f"{MOONCAKE}:MooncakeConnector.get_finished",
            "vllm.v1.worker.kv_connector_model_runner_mixin:"
            "KVConnectorModelRunnerMixin._get_kv_connector_output",
            "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished",
            "vllm.v1.core.sched.scheduler:Scheduler._handle_invalid_blocks",
        ),
    ),
    Target(
        f"{BOOTSTRAP}:MooncakeBootstrapServer.start",
        "host",
        f"{OURS}:bootstrap_start",
        context=(f"{BOOTSTRAP}:MooncakeBootstrapServer",),
    ),
)

BANDS = (Band("vllm", ">=0.16,<0.19", ("0.16.0", "0.17.0", "0.18.0"), PUSHES),)

UNTOUCHED: tuple[str, ...] = ()

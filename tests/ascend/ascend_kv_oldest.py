"""What 0.11's schedulers make of a request whose pull failed on one of two workers."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.sampling_params import SamplingParams
from vllm.utils import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput
from vllm.v1.request import Request
from vllm_ascend.core.recompute_scheduler import RecomputeScheduler

TOKENS, BLOCKS = 4, 20


def manager() -> KVCacheManager:
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return KVCacheManager(KVCacheConfig(BLOCKS, [], groups), max_model_len=64)


def request(name: str) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(3 * TOKENS + 1)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        eos_token_id=None,
        block_hasher=get_request_block_hasher(TOKENS, sha256),
    )


def steps(reports: list[list[tuple[str, bool]]]) -> Any:
    """Each worker's report of requests that have ended, and whether they failed, as one."""
    outputs = []
    for report in reports:
        received: Any = {name for name, _ in report}
        failed = frozenset(name for name, bad in report if bad)
        if failed:
            from ascend_patch.impl.kv_ascend_0_11 import Finished

            received = Finished(received)
            received.failed = failed
        output = copy.copy(EMPTY_MODEL_RUNNER_OUTPUT)
        output.kv_connector_output = KVConnectorOutput(finished_recving=received)
        # As it comes from another process.
        outputs.append(pickle.loads(pickle.dumps(output)))
    return outputs


def judged(kind: type, *, patched: bool) -> dict:
    """Three requests of two workers: one loaded, one that the first worker could not, one aside."""
    init_none_hash(sha256)
    scheduler = kind.__new__(kind)
    scheduler.finished_recving_kv_req_ids = set()
    scheduler.kv_cache_manager, scheduler.block_size = manager(), TOKENS
    scheduler.connector = SimpleNamespace(update_connector_output=lambda _: None)
    pool = scheduler.kv_cache_manager.block_pool
    free, found, requests = pool.get_num_free_blocks(), {}, {}
    for name in ("failed", "loaded"):
        one = requests[name] = request(name)
        count = one.num_tokens
        scheduler.kv_cache_manager.allocate_slots(one, count, delay_cache_blocks=True)
    aggregator = KVOutputAggregator(2)
    bad = patched
    # The first worker's failure comes a step before the second worker's end.
    for reports in ([[("failed", bad)], []], [[("loaded", False)], [("failed", False)]],
                    [[], [("loaded", False)]]):  # fmt: skip
        whole = aggregator.aggregate(steps(reports)).kv_connector_output
        scheduler._update_from_kv_xfer_finished(whole)
        for name in list(whole.finished_recving or ()):
            one = requests[name]
            ready = scheduler._update_waiting_for_remote_kv(one)
            taken = free - pool.get_num_free_blocks()
            cached = scheduler.kv_cache_manager.get_computed_blocks(request("other"))[1]
            found[name] = {
                "ready": ready, "computed": one.num_computed_tokens, "taken": taken,
                "cached": cached,
            }  # fmt: skip
            if name == "failed" and one.num_computed_tokens == 0:
                # And what a scheduler does next: all of the prompt, in blocks of its own.
                blocks = scheduler.kv_cache_manager.allocate_slots(one, one.num_tokens)
                found[name]["again"] = len(blocks.get_block_ids()[0])
    found["left"] = sorted(scheduler.finished_recving_kv_req_ids)
    return found


def everything(patched: bool) -> dict:
    return {
        kind.__name__: judged(kind, patched=patched) for kind in (Scheduler, RecomputeScheduler)
    }

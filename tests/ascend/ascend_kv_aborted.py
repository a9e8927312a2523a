"""What vLLM's own scheduler does with the blocks of a request that is aborted while it is pulled.

For 0.11.0 and 0.13.0, whose vLLM frees them at once; import it after `ascend_kv`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from ascend_kv import BLOCKS, ROLES, Pair, host, scheduler
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

TOKENS = 4


def made(kind: type, pair: Pair) -> Any:
    """A scheduler with the release's connector, as far as it frees requests."""
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    caches = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    given = {"hash_block_size": TOKENS} if "hash_block_size" in _names() else {}
    found = kind.__new__(kind)
    found.kv_cache_manager = KVCacheManager(caches, max_model_len=64, enable_caching=False, **given)
    found.kv_cache_config, found.block_size = caches, TOKENS
    found.requests, found.running = {}, []
    found.waiting = SimpleNamespace(remove_requests=lambda _: None)
    found.encoder_cache_manager = SimpleNamespace(free=lambda _: None)
    found.finished_req_ids, found.finished_req_ids_dict = set(), None
    found.finished_recving_kv_req_ids, found.failed_recving_kv_req_ids = set(), set()
    connector = host.MooncakeConnector.__new__(host.MooncakeConnector)
    connector.connector_scheduler = scheduler(pair, ROLES[1])
    connector.connector_worker = None
    found.connector = connector
    return found


def _names() -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(KVCacheManager.__init__).parameters)


def aborted(seed: int) -> dict[str, Any]:
    """Free blocks when a request is pulled, when it is aborted, and when its pull has ended."""
    one = made(Scheduler, Pair(1, 1, 2, seed=seed))
    pool = one.kv_cache_manager.block_pool
    found = {"free": [pool.get_num_free_blocks()]}
    import inspect

    given = (
        {"eos_token_id": None} if "eos_token_id" in inspect.signature(Request).parameters else {}
    )
    request = Request(
        request_id="aborted",
        prompt_token_ids=list(range(3 * TOKENS)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        **given,
    )
    request.kv_transfer_params = {
        "do_remote_prefill": True, "remote_block_ids": [1, 2, 3], "remote_engine_id": "a",
        "remote_host": "127.0.0.1", "remote_port": 5,
    }  # fmt: skip
    one.requests["aborted"] = request
    connector = one.connector.connector_scheduler
    tokens, _ = connector.get_num_new_matched_tokens(request, 0)
    blocks = one.kv_cache_manager.allocate_slots(request, tokens, delay_cache_blocks=True)
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    connector.update_state_after_alloc(request, blocks, tokens)
    connector.build_connector_meta(None)
    found["free"].append(pool.get_num_free_blocks())
    one.finish_requests("aborted", RequestStatus.FINISHED_ABORTED)
    found["free"].append(pool.get_num_free_blocks())
    one._update_from_kv_xfer_finished(KVConnectorOutput(finished_recving={"aborted"}))
    found["free"].append(pool.get_num_free_blocks())
    found["left"] = sorted(one.requests) + sorted(one.finished_recving_kv_req_ids)
    return found

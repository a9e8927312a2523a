"""Requests that are computed again get other blocks: vLLM's own scheduler code and block pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ascend_patch.impl import kv_vllm_scheduler

BLOCK, PROMPT = 16, 60


class MooncakeConnector:
    """What of a connector the scheduler asks for."""

    def update_connector_output(self, output: Any) -> None:
        pass


@pytest.fixture
def scheduler() -> Any:
    """vLLM's scheduler, with a request of four blocks that waits for its KV."""
    module = pytest.importorskip("vllm.v1.core.sched.scheduler", reason="vLLM is not here")
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config = KVCacheConfig(
        num_blocks=12, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    found = module.Scheduler.__new__(module.Scheduler)
    found.kv_cache_manager = KVCacheManager(
        config, max_model_len=1024, hash_block_size=BLOCK, enable_caching=False
    )
    request = Request("r", list(range(PROMPT)), SamplingParams(max_tokens=1), None)
    request.num_external_computed_tokens = PROMPT
    assert found.kv_cache_manager.allocate_slots(
        request, 0, num_external_computed_tokens=PROMPT, delay_cache_blocks=True
    )
    request.num_computed_tokens = PROMPT
    request.status = module.RequestStatus.WAITING_FOR_REMOTE_KVS
    found.requests, found.skipped_waiting, found.running = {"r": request}, [request], []
    found.block_size, found.recompute_kv_load_failures = BLOCK, True
    found.failed_recving_kv_req_ids, found.finished_recving_kv_req_ids = set(), set()
    found.connector = MooncakeConnector()
    return found


def blocks_of(scheduler: Any) -> list[int]:
    (found,) = scheduler.kv_cache_manager.get_block_ids("r")
    return list(found)


def report(scheduler: Any, *, invalid: set[int] = frozenset(), received: set[str]) -> None:
    """What the workers say of a step, through the wrappers."""
    if invalid:
        kv_vllm_scheduler.recompute_elsewhere(
            scheduler._handle_invalid_blocks, scheduler, (invalid,), {}
        )
    output = SimpleNamespace(finished_recving=received, finished_sending=None)
    kv_vllm_scheduler.update_from_kv_xfer_finished(
        scheduler._update_from_kv_xfer_finished, scheduler, (output,), {}
    )


def test_a_request_goes_on_in_other_blocks_and_the_first_come_back_later(scheduler) -> None:
    pool, request = scheduler.kv_cache_manager.block_pool, scheduler.requests["r"]
    free, first = pool.get_num_free_blocks(), blocks_of(scheduler)
    assert len(first) == 4
    report(scheduler, invalid=set(first), received=set())
    # It waits for nobody, and nobody gets the blocks that may be written to.
    assert scheduler._try_promote_blocked_waiting_request(request)
    assert request.num_computed_tokens == 0
    assert pool.get_num_free_blocks() == free
    assert scheduler.kv_cache_manager.allocate_slots(request, PROMPT)
    assert not set(blocks_of(scheduler)) & set(first)
    request.status = type(request.status).RUNNING
    report(scheduler, received={"r"})
    assert pool.get_num_free_blocks() == free
    scheduler.kv_cache_manager.free(request)
    assert pool.get_num_free_blocks() == free + 4
    assert not vars(scheduler)[kv_vllm_scheduler.ASIDE]


def test_a_request_that_ended_meanwhile_leaves_nothing_behind(scheduler) -> None:
    pool, request = scheduler.kv_cache_manager.block_pool, scheduler.requests["r"]
    free = pool.get_num_free_blocks()
    report(scheduler, invalid=set(blocks_of(scheduler)), received=set())
    assert scheduler._try_promote_blocked_waiting_request(request)
    del scheduler.requests["r"]
    report(scheduler, received={"r"})
    assert pool.get_num_free_blocks() == free + 4


def test_what_is_reported_at_once_comes_back_at_once(scheduler) -> None:
    pool, request = scheduler.kv_cache_manager.block_pool, scheduler.requests["r"]
    free = pool.get_num_free_blocks()
    report(scheduler, invalid=set(blocks_of(scheduler)), received={"r"})
    assert pool.get_num_free_blocks() == free + 4
    assert scheduler._try_promote_blocked_waiting_request(request)


@pytest.mark.parametrize("change", ["another connector", "fail"])
def test_others_are_as_the_host_has_them(scheduler, change) -> None:
    """The control: the host waits for the report."""
    if change == "fail":
        scheduler.recompute_kv_load_failures = False
    else:
        scheduler.connector = SimpleNamespace(update_connector_output=lambda _: None)
    first = blocks_of(scheduler)
    report(scheduler, invalid=set(first), received=set())
    assert not scheduler._try_promote_blocked_waiting_request(scheduler.requests["r"])
    assert blocks_of(scheduler) == first

"""What an engine step hears of a worker's connector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def newest(connector: Any) -> tuple[set, set]:
    """What has finished, and what was not loaded."""
    _, done = connector.get_finished(set())
    return done or set(), connector.get_block_ids_with_load_errors()


def oldest(connector: Any) -> tuple[set, set]:
    """The same by 0.11's model runner: requests that failed in place of blocks."""
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    kept = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    try:
        step = SimpleNamespace(finished_req_ids=set())
        _, done = NPUModelRunner.get_finished_kv_transfer(step)
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = kept
    return done or set(), set(getattr(done, "failed", ()))

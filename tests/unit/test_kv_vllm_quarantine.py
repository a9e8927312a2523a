"""Blocks that are kept: how many, since when, and when no pull begins; who refuses connections."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ascend_patch import _runtime
from ascend_patch.impl import kv_vllm_link, kv_vllm_quarantine
from ascend_patch.impl.kv_vllm_quarantine import Quarantine


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The process's state, which says how often it was written."""
    found = SimpleNamespace(facts={}, written=0)

    def write() -> None:
        found.written += 1

    found.write = write
    monkeypatch.setattr(_runtime, "current", lambda: SimpleNamespace(state=found))
    monkeypatch.setattr(kv_vllm_quarantine, "WRITE_S", 0.05)
    return found


def test_the_status_says_what_is_kept_and_since_when(state) -> None:
    async def run() -> None:
        kept = Quarantine(100, 0.25)
        began = time.time()
        for number in range(20):
            kept.enter(number, 1)
        await asyncio.sleep(0.3)
        # Many that enter together are written once.
        assert state.written == 1
        said = state.facts["kv_quarantine"]
        assert (said["blocks"], said["requests"], said["limit"]) == (20, 20, 25)
        assert began <= said["since"] <= time.time()
        json.dumps(said)
        for number in range(20):
            kept.leave(number)
        await asyncio.sleep(0.3)
        assert state.facts["kv_quarantine"]["blocks"] == 0
        assert state.facts["kv_quarantine"]["since"] is None

    asyncio.run(run())


def test_at_the_limit_no_pull_begins(state) -> None:
    async def run() -> None:
        kept = Quarantine(100, 0.25)
        kept.enter("a", 24)
        assert not kept.refusal()
        kept.enter("b", 1)
        assert "25 of 100 blocks are kept" in kept.refusal()
        kept.leave("a")
        assert not kept.refusal()
        # What was never kept does not count.
        kept.leave("another")
        assert kept.blocks == 1
        await asyncio.sleep(0.2)

    asyncio.run(run())


def test_only_a_refusal_is_one() -> None:
    async def run() -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
            assert await kv_vllm_link.is_refused(address)
            listening.listen()
            assert not await kv_vllm_link.is_refused(address)
        assert await kv_vllm_link.is_refused(address)
        # No such host is no refusal of it.
        assert not await kv_vllm_link.is_refused("tcp://no-such-host.invalid:1")

    asyncio.run(run())


def test_a_port_that_is_refused_once_is_no_end(monkeypatch) -> None:
    """A process that opens its socket again is not gone."""
    answers = [True, False, False, True, True]

    async def is_refused(address: str) -> bool:
        return answers.pop(0)

    monkeypatch.setattr(kv_vllm_link, "is_refused", is_refused)
    monkeypatch.setattr(kv_vllm_quarantine, "SETTLE_S", 0.01)
    monkeypatch.setattr(kv_vllm_quarantine, "FIRST_PAUSE_S", 0.01)

    async def ended() -> bool:
        return await kv_vllm_quarantine.has_ended("tcp://h:1")

    asyncio.run(asyncio.wait_for(kv_vllm_quarantine.until_ended(ended), 5))
    assert not answers

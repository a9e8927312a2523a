"""Which implementation is picked, what is logged about the others, and who is told of calls."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.dispatch import ANY_DEVICE, Implementation


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(dispatch, "_table", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_observer", None)


def only_even(n):
    return (True, "") if n % 2 == 0 else (False, "n must be even")


def test_higher_priority_is_asked_first_and_the_devices_own_before_any():
    slow = Implementation("slow", lambda n: n)
    fast = Implementation("fast", lambda n: n, only_even, priority=10)
    dispatch.register("op", ANY_DEVICE, slow)
    dispatch.register("op", "npu", Implementation("own", lambda n: n, only_even))
    dispatch.register("op", "npu", fast)
    assert [i.name for i in dispatch.candidates("op", "npu")] == ["fast", "own", "slow"]
    assert dispatch.select("op", "npu", 2).implementation is fast
    assert dispatch.select("op", "cpu", 2).implementation is slow


def test_a_rejection_is_logged_once_and_told_each_time(caplog):
    caplog.set_level(logging.INFO, logger=dispatch.logger.name)
    dispatch.register("op", "npu", Implementation("fast", lambda n: n, only_even))
    for _ in range(3):
        choice = dispatch.select("op", "npu", 3)
        assert choice.implementation is None
        assert choice.reason == "fast: n must be even"
    assert [r.message for r in caplog.records] == [
        "op on npu: fast cannot take this call: n must be even"
    ]


def test_a_choice_keeps_the_reasons_of_those_turned_down():
    dispatch.register("op", "npu", Implementation("fast", lambda n: n, only_even, priority=1))
    dispatch.register("op", ANY_DEVICE, Implementation("slow", lambda n: n))
    choice = dispatch.select("op", "npu", 3)
    assert choice.implementation is not None
    assert (choice.implementation.name, choice.reason) == ("slow", "fast: n must be even")


def test_nobody_registered_is_a_reason():
    choice = dispatch.select("op", "xpu")
    assert choice.implementation is None
    assert "no implementation of op is registered for device type 'xpu'" in choice.reason


def test_registering_again_replaces_and_unregistering_removes():
    first, second = (Implementation("a", print, priority=n) for n in (1, 2))
    dispatch.register("op", "cpu", first)
    dispatch.register("op", "cpu", second)
    assert dispatch.candidates("op", "cpu") == (second,)
    dispatch.unregister("op", "cpu", "a")
    dispatch.unregister("op", "cpu", "never there")
    assert dispatch.candidates("op", "cpu") == ()


def test_observer_is_told_and_the_previous_one_comes_back():
    seen: list[str] = []
    assert dispatch.set_observer(seen.append) is None
    dispatch.observe("op")
    assert dispatch.set_observer(None) == seen.append
    dispatch.observe("op")
    assert seen == ["op"]


def test_threads_lose_no_registration():
    def add(n):
        dispatch.register("op", "cpu", Implementation(str(n), lambda: n))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(dispatch.candidates("op", "cpu")) == 32


def test_importing_dispatch_imports_no_torch():
    code = (
        "import sys, ascend_patch.kernels.dispatch; assert 'torch' not in sys.modules, 'torch came'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

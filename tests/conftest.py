"""What every test shares: errors that production swallows fail a test, seeds are printed."""

from __future__ import annotations

import os
import secrets
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehost import FakeHost

from ascend_patch import _apply, _runtime

# Nothing that the caller's shell says about the shim reaches a test.
for _name in [name for name in os.environ if name.startswith("ASCEND_PATCHES")]:
    del os.environ[_name]


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "slow: takes more than ten seconds; left out of the everyday run",
        "e2e: starts real vLLM servers",
        "expects_failure: the shim is meant to swallow an error in this test",
    ):
        config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def nothing_swallowed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Fail a test in which the shim swallowed an error, unless it is marked `expects_failure`.

    Returns:
        What was swallowed so far, as tracebacks.
    """
    swallowed: list[str] = []

    def noted(error: BaseException) -> None:
        swallowed.append("".join(traceback.format_exception(error)))

    record, fail = _runtime.record_internal_error, _apply.Applier._fail

    def record_and_note(module: str, error: BaseException) -> None:
        noted(error)
        record(module, error)

    def fail_and_note(self, patch, target_id, error) -> None:
        noted(error)
        fail(self, patch, target_id, error)

    monkeypatch.setattr(_runtime, "record_internal_error", record_and_note)
    monkeypatch.setattr(_apply.Applier, "_fail", fail_and_note)
    yield swallowed
    if swallowed and request.node.get_closest_marker("expects_failure") is None:
        pytest.fail("the shim swallowed an error:\n" + "\n".join(swallowed))


@pytest.fixture
def seed() -> int:
    """A new seed each time; ASCEND_PATCH_SEED repeats the one that a failure printed."""
    chosen = os.environ.get("ASCEND_PATCH_SEED")
    value = int(chosen) if chosen else secrets.randbelow(2**31)
    print(f"repeat with ASCEND_PATCH_SEED={value}")
    return value


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A small fake `vllm` that subprocesses import, with patches of the test's own."""
    return FakeHost(tmp_path)

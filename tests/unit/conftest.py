"""Fixtures of the unit tests."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascend_patch._apply import Applier
from ascend_patch._finder import Finder, Watch
from ascend_patch._plan import Decision
from ascend_patch._registry import Band, Patch, Target
from ascend_patch._state import PatchState, ProcessState


class FinderSite:
    """A folder on sys.path, a finder, and what it called back."""

    def __init__(self, folder: Path, finder: Finder) -> None:
        self.folder, self.finder = folder, finder
        self.calls: list[str] = []
        self.errors: list[tuple[str, BaseException]] = []

    def write(self, name: str, source: str = "value = 1\n") -> Path:
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()
        return path

    def watch(self, name: str, finder: Finder | None = None) -> bool:
        def after(module: types.ModuleType) -> None:
            self.calls.append(f"after {name} value={getattr(module, 'value', None)}")

        before = lambda spec: self.calls.append(f"before {spec.name}")  # noqa: E731
        return (finder or self.finder).watch(name, Watch(before, after))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FinderSite]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loaded = set(sys.modules)
    made = FinderSite(tmp_path, Finder(lambda name, error: made.errors.append((name, error))))
    made.finder.arm()
    yield made
    made.finder.disarm()
    for name in set(sys.modules) - loaded:
        if name.startswith("ap_"):
            del sys.modules[name]
    assert made.errors == [], "a callback failed"


class Bench:
    """Patches of the test's own, on modules `ap_*` that the test makes, in this process."""

    def __init__(self, finder: Finder) -> None:
        self.finder = finder
        self.state = ProcessState()
        self.applier = Applier(self.state, finder)
        self.decisions: dict[str, Decision] = {}

    def declare(self, *targets: Target, name: str = "demo", requires: tuple[str, ...] = ()) -> None:
        """Declare a patch that was decided to apply."""
        band = Band("vllm", "", ("1.0",), targets)
        patch = Patch(name, "1", "s", "w", "u", "r", (band,), requires=requires)
        self.decisions[name] = Decision(patch, "armed", "because", band)
        self.state.patches[name] = PatchState(name, "1", "armed", "because")

    def arm(self, *targets: Target) -> PatchState:
        """Wait for the modules of what was declared, and of these targets."""
        if targets:
            self.declare(*targets)
        self.applier.arm(self.decisions)
        return next(iter(self.state.patches.values()))


@pytest.fixture
def new_bench() -> type[Bench]:
    """For tests that need more than one; `conftest` is no name to import from."""
    return Bench


@pytest.fixture
def bench(site: FinderSite) -> Bench:
    return Bench(site.finder)


@pytest.fixture
def ours() -> types.ModuleType:
    """A module `ap_ours` of replacements: each says that it ran, and calls the original."""
    module = types.ModuleType("ap_ours")

    def host(wrapped, instance, args, kwargs):
        return ["ours", *wrapped(*args, **kwargs)]

    def function(original):
        def ours(x):
            return ["ours", *original(x)]

        return ours

    def method(original):
        def ours(self, x):
            return ["ours", *original(self, x)]

        return ours

    module.host, module.function, module.method = host, function, method
    sys.modules["ap_ours"] = module
    return module


@pytest.fixture
def kv_host(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """vLLM's Mooncake connector; pulls that fail are begun again, and end, without much waiting."""
    pytest.importorskip("torch", reason="torch is not installed here")
    import kv_engine

    from ascend_patch.impl import kv_vllm_pull, kv_vllm_quarantine

    monkeypatch.setattr(kv_vllm_pull, "BACKOFF_S", 0.05)
    monkeypatch.setattr(kv_vllm_quarantine, "SETTLE_S", 0.05)
    monkeypatch.setattr(kv_vllm_quarantine, "FIRST_PAUSE_S", 0.1)
    return kv_engine.connector(monkeypatch)


@pytest.fixture
def kv_lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What transfers log; at which level vLLM was imported by another test does not matter."""
    # vLLM's logger hands nothing on, and its level is what the environment said at import.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm")
    return caplog

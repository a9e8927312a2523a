"""Fixtures of the unit tests."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascend_patch._finder import Finder, Watch


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

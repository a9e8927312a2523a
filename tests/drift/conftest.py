"""What all tests here share; and scripts/record_release with data and index of a test's own."""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from made_release import LIMIT, PATCH, ROPE, Tree, written

from ascend_patch import _records, _registry

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True, scope="module")
def no_collection() -> Iterator[None]:
    """Syntax trees have no cycles, and the collector would walk a million nodes again and again."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command, with data, cache and registry of the test's own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    loader = importlib.machinery.SourceFileLoader("record_release", str(SCRIPTS / "record_release"))
    spec = importlib.util.spec_from_loader("record_release", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setenv("ASCEND_PATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_registry, "load", lambda: {"turn": PATCH})
    monkeypatch.setattr(_records, "CORE", {"vllm": ("vllm.limits:hook",), "vllm_ascend": ()})
    monkeypatch.setattr(_records, "_data", lambda host: written(module, host))
    monkeypatch.setattr(_records, "forget", lambda: None)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An unpacked release: `factor` and `limit` are what may move in it."""

    def make(name: str, factor: int = 1, limit: int = 4, **modules: str) -> Path:
        root = tmp_path / name
        sources = {
            "__init__": "raise RuntimeError('imported')\n",
            "rope": ROPE.format(factor),
            "limits": LIMIT.format(limit) + "def hook(): ...\n",
            **modules,
        }
        for module, source in sources.items():
            file = root / "vllm" / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return root

    return make


@pytest.fixture
def index(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that pip looks into and no other; a real pip and real wheels."""
    import _package_index

    folder = tmp_path / "index"
    folder.mkdir()
    # Wheels of other machines are asked for one after another, two seconds each.
    monkeypatch.setattr(_package_index, "PYTHONS", ())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder

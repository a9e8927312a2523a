"""Interpreters to boot: made by hand in tmp_path, so that nothing of this machine takes part."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import ROOT, House, base_python, copy_shim


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long or needs a package index")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder that the drop-in form puts on PYTHONPATH."""
    return ROOT


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Path:
    """A folder that holds what an installed shim puts into site-packages."""
    folder = tmp_path_factory.mktemp("shim")
    copy_shim(ROOT, folder)
    return folder


@pytest.fixture
def house(tmp_path) -> House:
    """A virtual environment with nothing in it."""
    return House.build(tmp_path / "house", base_python())


@pytest.fixture
def furnished(house, shim) -> House:
    """A virtual environment with the shim installed."""
    house.install(shim)
    return house


@pytest.fixture
def fake_vllm(tmp_path) -> Path:
    """A folder with a package `vllm` that holds nothing but its version."""
    package = tmp_path / "fake" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from vllm._version import __version__\n")
    (package / "_version.py").write_text("__version__ = '0.18.0'\n")
    return package.parent

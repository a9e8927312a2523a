"""What the servers of these tests run in: vLLM's default release, and the newest."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import _env
import _installer
import pytest
from _system import find_library

CHECKOUT = Path(__file__).resolve().parents[2]
# The one of the newest release's torch. Its wheel is linked against torch's with CUDA: beside the
# CPU's it cannot load its operators, and fails where it adds to them. Images need neither, so the
# tests have a copy without that module; no environment has it installed.
TORCHVISION = "torchvision==0.28.0"
ADDS_TO_OPERATORS = "torchvision/_meta_registrations.py"


@dataclass(frozen=True)
class Python:
    """The interpreters that servers run in.

    Attributes:
        patched: Has vLLM and the shim.
        plain: Has vLLM. Without scripts/test it is the same one.
        drop_in: For PYTHONPATH, the shim where `patched` does not have it installed.
        preload: For LD_PRELOAD.
    """

    patched: Path
    plain: Path
    drop_in: str
    preload: str


def find_python(release: str = _env.DEFAULT) -> Python:
    """Return what scripts/test prepared, or else this interpreter with the checkout dropped in.

    A test of a release that is neither here nor prepared is skipped.
    """
    variables = "ASCEND_PATCH_E2E" if release == _env.DEFAULT else "ASCEND_PATCH_E2E_NEWEST"
    prepared = os.environ.get(f"{variables}_PYTHON")
    if prepared:
        plain = Path(os.environ[f"{variables}_PLAIN_PYTHON"])
        return Python(Path(prepared), plain, "", os.environ[f"{variables}_PRELOAD"])
    if release != _env.DEFAULT:
        pytest.skip(f"there is no environment with vLLM {release}; scripts/test makes one")
    here = Path(sys.executable)
    libraries = [
        find_library("libtcmalloc_minimal.so.4"),
        str(Path(sys.prefix) / "lib/libiomp5.so"),
    ]
    preload = ":".join(path for path in libraries if path and os.path.exists(path))
    return Python(here, here, str(CHECKOUT), preload)


def path_for_images(release: str) -> list[str]:
    """Return what PYTHONPATH needs for models that take images."""
    if release == _env.DEFAULT:
        return []
    folder = _env.cache_root() / TORCHVISION.replace("==", "-")
    with _env.locked(folder):
        marker = folder / _env.MARKER
        if not marker.exists():
            python = find_python(release).plain
            _installer.install_folder(folder, TORCHVISION, _env.cache_root(), python=python)
            (folder / ADDS_TO_OPERATORS).write_text("")
            marker.touch()
    return [str(folder)]

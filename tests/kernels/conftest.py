"""Fixtures of the kernel tests: a fresh seed that a failure prints, and poisoned allocations."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator

import pytest

# Two cores are shared by everything else; intra-op threads only add noise to sizes like these.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def seed() -> int:
    """A new seed each time; ASCEND_PATCH_SEED repeats the one that a failure printed."""
    chosen = os.environ.get("ASCEND_PATCH_SEED")
    value = int(chosen) if chosen else secrets.randbelow(2**31)
    print(f"repeat with ASCEND_PATCH_SEED={value}")
    return value


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device type that a kernel test runs on; skipped where this machine has none."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    return str(request.param)


@pytest.fixture
def poison() -> Iterator[None]:
    """Have torch fill fresh memory with NaN, so that an element nobody wrote is seen."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True, scope="module")
def no_surface_left() -> Iterator[None]:
    """The operator surface that one module's tests install is not there for the next one's."""
    yield
    surface = sys.modules.get("ascend_patch.kernels.npu_ops.surface")
    found = surface.installed() if surface is not None else None
    if found is not None:
        found.remove()


@pytest.fixture
def on_the_surface() -> Iterator[None]:
    """torch_npu's operators on CPU tensors, in float32 too; one thread, for sizes like these."""
    import torch

    from ascend_patch.kernels.npu_ops import surface

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    surface.install()
    with surface.settings(allow=("float32",)):
        yield
    torch.set_num_threads(threads)

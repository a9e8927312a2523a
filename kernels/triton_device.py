"""What every launch of a Triton kernel asks of the machine. Importing this imports no triton."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch


def has_triton(backend: str) -> bool:
    """Is there a triton with this backend? Looks at the file system, imports nothing.

    Args:
        backend: `nvidia` or `ascend`.
    """
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec is not None else None
    return any(os.path.isdir(os.path.join(f, "backends", backend)) for f in folders or ())


def vector_cores(index: int) -> int:
    """Vector cores of an NPU: as many programs without matrix products run at a time."""
    return _cores(index, "num_vectorcore")


def cube_cores(index: int) -> int:
    """Cube cores of an NPU: as many programs with matrix products run at a time."""
    return _cores(index, "num_aicore")


@cache
def _cores(index: int, kind: str) -> int:
    from triton.runtime import driver

    utils: Any = driver.active.utils
    return int(utils.get_device_properties(index)[kind])


def on_device(device: torch.device) -> Any:
    """Make ``device`` current: Triton launches on the current one, not on its arguments'."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    module: Any = getattr(torch, device.type)
    return module.device(device.index)

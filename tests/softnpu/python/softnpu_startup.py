"""Started by a .pth file in every process that has SOFTNPU set: waits for torch_npu's import.

Once a module of `AFTER` has been imported, its operators get kernels. Nothing is imported here.
With SOFTNPU_TRITON=1 it waits for Triton as well.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def _after_torch_npu() -> None:
    from softnpu import install

    install.after_torch_npu()


def _after_vllm_ascend_c() -> None:
    from softnpu import install

    install.after_vllm_ascend_c()


def _after_triton_backends() -> None:
    from softnpu import triton

    triton.after_backends()


def _after_triton() -> None:
    from softnpu import triton

    triton.after_triton()


AFTER: dict[str, Callable[[], None]] = {
    "torch_npu": _after_torch_npu,
    "vllm_ascend.vllm_ascend_C": _after_vllm_ascend_c,
}


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In place of a vllm_ascend_C that this torch cannot load: its schemas, and nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "vllm_ascend.vllm_ascend_C" else None

    def exec_module(self, module: ModuleType) -> None:
        from softnpu import install

        install.define_schemas(os.environ["SOFTNPU_SCHEMAS"])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `AFTER` as everybody else would, and adds a step to their loading."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        then = AFTER.get(name)
        if then is None or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("SOFTNPU_TRITON") == "1":
    os.environ["TRITON_INTERPRET"] = "1"  # read while triton is imported
    AFTER |= {"triton.backends": _after_triton_backends, "triton": _after_triton}
if os.environ.get("SOFTNPU_SCHEMAS"):
    sys.meta_path.insert(0, _StandIn())
sys.meta_path.insert(0, _Finder())

"""Triton's driver for the software NPU: what vLLM and vllm-ascend ask about the device."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

UNIFIED_BUFFER = 192 << 10  # bytes of one vector core of Ascend910B


class _Utils:
    """`driver.active.utils`, by the names of Triton for Ascend."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, Any]:
        """Return the number of cores, as torch_npu's own properties have them."""
        found = torch.npu.get_device_properties(device)
        return {
            "num_aicore": found.cube_core_num,
            "num_vectorcore": found.vector_core_num,
            "max_shared_mem": UNIFIED_BUFFER,
        }


class Driver(DriverBase):
    """The one active driver: the interpreter needs no other device's."""

    def __init__(self) -> None:
        self.utils = _Utils()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> NoReturn:
        raise NotImplementedError(f"software NPU: no C++ is made of Triton kernels ({ty})")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("npu", os.environ.get("SOFTNPU_SOC", "Ascend910B3"), 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("npu", self.get_current_device())

    def get_current_device(self) -> int:
        return int(torch.npu.current_device())

    def set_current_device(self, device: int) -> None:
        torch.npu.set_device(device)

    def get_current_stream(self, device: int | None = None) -> int:
        return int(torch.npu.current_stream(device).npu_stream)

    def get_device_interface(self) -> Any:
        return torch.npu

    def get_benchmarker(self) -> NoReturn:
        raise NotImplementedError("software NPU: the time of a Triton kernel here means nothing")


class Compiler:
    """In the place of a compiler: kernels are interpreted, so whoever asks for one is refused."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        if target.backend == "npu":
            raise NotImplementedError(
                "software NPU: Triton kernels are interpreted here and cannot be compiled"
            )
        return False

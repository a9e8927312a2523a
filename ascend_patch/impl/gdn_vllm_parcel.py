"""Several small arrays of a host to a device in one asynchronous copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ascend_patch.kernels.gdn import PinnedStaging

# In int32 elements: parts begin where fresh tensors of any dtype may.
_ALIGNED = 16
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.bool_): torch.bool,
}


class Parcel:
    """Arrays in the order in which they were put; their tensors in the same order."""

    def __init__(self) -> None:
        self._parts: list[tuple[npt.NDArray[Any], int]] = []
        self._elements = 0

    def put(self, array: npt.NDArray[Any]) -> int:
        """Add an int32, int64 or bool array; returns its place in what `send` returns."""
        array = np.ascontiguousarray(array)
        if array.dtype not in _DTYPES:
            raise TypeError(f"a parcel takes int32, int64 and bool arrays, not {array.dtype}")
        self._parts.append((array, self._elements))
        self._elements += -(-array.nbytes // (4 * _ALIGNED)) * _ALIGNED
        return len(self._parts) - 1

    def send(self, device: torch.device, staging: PinnedStaging | None) -> list[Tensor]:
        """Enqueue the copy.

        Args:
            device: Where to.
            staging: Its host memory; None, on a CPU, copies at once.

        Returns:
            A tensor for each array, in its shape and dtype, parts of one allocation.
        """
        if not self._elements:
            return [
                torch.empty(array.shape, dtype=_DTYPES[array.dtype], device=device)
                for array, _ in self._parts
            ]
        if staging is not None:
            packed = staging.send(self._elements, self._write)
        else:
            host = torch.empty(self._elements, dtype=torch.int32)
            self._write(host.numpy())
            packed = host.to(device)
        return [self._part(packed, *part) for part in self._parts]

    def _write(self, memory: npt.NDArray[np.int32]) -> None:
        for array, at in self._parts:
            raw = memory[at:].view(np.uint8)[: array.nbytes]
            raw[:] = array.reshape(-1).view(np.uint8)

    def _part(self, packed: Tensor, array: npt.NDArray[Any], at: int) -> Tensor:
        dtype = _DTYPES[array.dtype]
        end = at + -(-array.nbytes // 4)
        return packed[at:end].view(dtype)[: array.size].view(array.shape)

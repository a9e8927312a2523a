"""Host memory that asynchronous copies read from, handed out again only when they have.

A copy to the device is enqueued and returns; the device reads the host's memory later. Memory that
is written again before that reaches the device half old, half new. Two buffers in turn are not
enough: asynchronous scheduling has one step's builds in flight while the next are made, and a step
may build twice (a drafter, a second group of layers, a warm-up).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Fill = Callable[[npt.NDArray[np.int32]], None]

SMALLEST = 4096
# Far beyond what any scheduler has in flight; past it a build waits for the oldest copy.
MOST_SLOTS = 64


class Event(Protocol):
    """What a device's event can do."""

    def query(self) -> bool:
        """Whether all that was enqueued before it is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class Transfer(Protocol):
    """How memory reaches one device."""

    def allocate(self, elements: int) -> Tensor:
        """Host memory for int32 [elements]."""
        ...

    def send(self, host: Tensor) -> tuple[Tensor, Event]:
        """Enqueue a copy: the device's tensor, and the event behind the copy."""
        ...


class DeviceTransfer:
    """Pinned memory and the device's own events; plain memory where the device cannot pin."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._pins = True

    def allocate(self, elements: int) -> Tensor:
        if self._pins:
            try:
                return torch.empty(elements, dtype=torch.int32, pin_memory=True)
            except RuntimeError:
                # A driver or a container without locked memory. The copies then block the host.
                self._pins = False
        return torch.empty(elements, dtype=torch.int32)

    def send(self, host: Tensor) -> tuple[Tensor, Event]:
        on_device = host.to(self._device, non_blocking=True)
        event = self._module.Event()
        event.record()
        return on_device, event


@dataclass(eq=False)
class _Slot:
    """Host memory and the event of the copy that last read it."""

    memory: Tensor
    event: Event | None = None

    def free(self) -> bool:
        return self.event is None or self.event.query()


class PinnedStaging:
    """A ring of host buffers for one device.

    Args:
        device: Where copies go; not a CPU, which needs none.
        slots: Buffers to begin with; more are made while none is free.
        transfer: For tests; the device's own by default.

    Raises:
        ValueError: The device is a CPU, or ``slots`` is below 1.
    """

    def __init__(
        self, device: torch.device, *, slots: int = 2, transfer: Transfer | None = None
    ) -> None:
        if transfer is None and device.type == "cpu":
            raise ValueError("a CPU reads host memory directly; build its metadata unstaged")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}")
        self._transfer = transfer if transfer is not None else DeviceTransfer(device)
        self._slots = [_Slot(self._transfer.allocate(SMALLEST)) for _ in range(slots)]
        self._next = 0
        self._lock = threading.Lock()
        self.waits = 0
        """How often a build had to wait for the device; 0 but for more than MOST_SLOTS in flight"""

    def __len__(self) -> int:
        return len(self._slots)

    def send(self, elements: int, fill: Fill) -> Tensor:
        """Have ``fill`` write int32 [elements] into host memory; enqueue its copy.

        Returns:
            int32 [elements] on the device, ready in the current stream's order.
        """
        with self._lock:
            slot = self._free_slot(elements)
            host = slot.memory[:elements]
            fill(host.numpy())
            on_device, slot.event = self._transfer.send(host)
        return on_device

    def _free_slot(self, elements: int) -> _Slot:
        slot = self._slots[self._next]
        if not slot.free():
            if len(self._slots) < MOST_SLOTS:
                slot = _Slot(self._transfer.allocate(max(SMALLEST, elements)))
                # Before the oldest in use, so that this one is the youngest of the ring.
                self._slots.insert(self._next, slot)
            else:
                assert slot.event is not None
                self.waits += 1
                slot.event.synchronize()
        if slot.memory.numel() < elements:
            slot.memory = self._transfer.allocate(1 << (elements - 1).bit_length())
        self._next = (self._slots.index(slot) + 1) % len(self._slots)
        return slot

"""A device whose copies are late, and the scheme of two buffers in turn that it defeats."""

from __future__ import annotations

import random
from collections import deque

import torch


class Late:
    """Copies happen when `catch_up` says so, oldest first, and read the memory only then."""

    def __init__(self) -> None:
        self._waiting: deque = deque()

    def allocate(self, elements: int) -> torch.Tensor:
        return torch.full((elements,), -1, dtype=torch.int32)

    def send(self, host: torch.Tensor):
        on_device = torch.full_like(host, -2)
        event = _LateEvent(self, host, on_device)
        self._waiting.append(event)
        return on_device, event

    def catch_up(self, left: int = 0) -> None:
        """Run copies until that many are waiting."""
        while len(self._waiting) > left:
            self._waiting.popleft().run()

    def until(self, event: _LateEvent) -> None:
        while not event.done:
            self._waiting.popleft().run()


class _LateEvent:
    def __init__(self, device: Late, host: torch.Tensor, on_device: torch.Tensor) -> None:
        self._device, self._host, self._on_device = device, host, on_device
        self.done = False

    def run(self) -> None:
        self._on_device.copy_(self._host)
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._device.until(self)


class TwoInTurn:
    """Two buffers, used alternately, whatever the device has read so far."""

    def __init__(self, transfer) -> None:
        self._transfer = transfer
        self._buffers = [transfer.allocate(1 << 16) for _ in range(2)]

    def send(self, elements: int, fill) -> torch.Tensor:
        self._buffers.reverse()
        host = self._buffers[0][:elements]
        fill(host.numpy())
        return self._transfer.send(host)[0]


def wrong_builds(send, late: Late, seed: int, in_flight: int, builds: int = 50) -> int:
    """How many of the builds arrive changed, with so many copies waiting when one is made."""
    draw = random.Random(seed)
    sent = []
    for _ in range(builds):
        values = [draw.randrange(1 << 30) for _ in range(draw.randrange(1, 9000))]
        late.catch_up(in_flight - 1)

        def fill(memory, values=values) -> None:
            memory[:] = values

        sent.append((values, send(len(values), fill)))
    late.catch_up()
    return sum(values != tensor.tolist() for values, tensor in sent)

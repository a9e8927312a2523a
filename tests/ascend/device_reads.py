"""How often code asks a device for a number: the host then waits for all that is enqueued.

Tensors are on the CPU here. Inside `counted` those that are named are taken for a device's, and so
is what is made of them; or all are. What stands for a kernel runs in `enqueued`: a device would do
that later.
"""

from __future__ import annotations

import collections
import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
# Each of these has a result, or a shape, that only the device knows.
READS = {
    aten._local_scalar_dense.default: "_local_scalar_dense",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.unique_consecutive.default: "unique",
}
# With a mask among the indices torch_npu counts its ones, or reads the one value to be set.
BY_MASK = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
TO_HOST = {torch.Tensor.cpu: "cpu", torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy"}

_paused = threading.local()


@contextlib.contextmanager
def enqueued():
    """What a device does on its own."""
    before = getattr(_paused, "on", False)
    _paused.on = True
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            yield
    finally:
        _paused.on = before


def as_kernel(function):
    def call(*args, **kwargs):
        with enqueued():
            return function(*args, **kwargs)

    return call


class _Memory:
    """Which memory is the device's: an address stays its tensor's while the count is taken.

    Args:
        device: Tensors in it; None: all are, and what is made of none.
    """

    def __init__(self, device) -> None:
        self._all = self.fresh = device is None
        self._kept: list[torch.Tensor] = list(device or ())
        self._where = {tensor.untyped_storage().data_ptr(): True for tensor in self._kept}

    def is_device(self, tensor) -> bool:
        return self._where.get(tensor.untyped_storage().data_ptr(), self._all)

    def made(self, tensors, device: bool) -> None:
        for tensor in tensors:
            self._kept.append(tensor)
            self._where[tensor.untyped_storage().data_ptr()] = device


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class _Operators(TorchDispatchMode):
    def __init__(self, found, memory) -> None:
        super().__init__()
        self._found, self._memory = found, memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        device = any(map(self._memory.is_device, given)) if given else self._memory.fresh
        if device and not getattr(_paused, "on", False):
            self._count(func, args, kwargs)
        result = func(*args, **kwargs)
        self._memory.made(_tensors(result), device)
        return result

    def _count(self, func, args, kwargs) -> None:
        if func in READS:
            self._found[READS[func]] += 1
        elif func in BY_MASK:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._found["by mask"] += 1
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._found["repeat_interleave"] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, found, memory) -> None:
        super().__init__()
        self._found, self._memory = found, memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = TO_HOST.get(func)
        if func is torch.Tensor.to and "cpu" in map(str, [*args[1:2], kwargs.get("device")]):
            # A copy to the runner's device is a CPU's here too; only the word says where it goes.
            name = "to cpu" if "cpu" in args[1:2] or kwargs.get("device") == "cpu" else None
        if name and not getattr(_paused, "on", False) and self._memory.is_device(args[0]):
            self._found[name] += 1
            result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                # From here on it is the host's.
                with enqueued():
                    result = result.clone()
                self._memory.made([result], False)
            return result
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted(device=None):
    """Count the reads of the code inside.

    Args:
        device: The tensors that are on a device; None: all that there are.

    Yields:
        A counter, by what read.
    """
    found: collections.Counter = collections.Counter()
    memory = _Memory(device)
    with _Methods(found, memory), _Operators(found, memory):
        yield found

"""A device that is not the host's, on any machine, and a count of how often it is waited for.

Its tensors say that they are on `meta`, so that torch neither computes with them nor gives away
their values; what they hold is reached through the mode alone. The mode counts what makes a host
wait for a GPU: scalars and lists that are read, boolean masks (their size is read), copies back,
and copies there that are not asked to be asynchronous.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")
# Their result's size is read from the device.
_SIZED = {aten.nonzero.default, aten.masked_select.default, aten.unique_dim.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Remote(torch.Tensor):
    """A tensor of the device; `held` is what is in it."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Remote:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"Remote({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the device, outside of its mode")


def here(x: object) -> object:
    """What a tensor of the device holds; anything else as it is."""
    return x.held if isinstance(x, Remote) else x


class Device(TorchDispatchMode):
    """While it is entered, `DEVICE` is a device; `waits` counts by what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if any(x.is_meta and not isinstance(x, Remote) for x in tensors):
            raise RuntimeError(f"{func} on a tensor that was made past the mode")
        remote = any(isinstance(x, Remote) for x in tensors)
        self._count(func, tensors, args, kwargs, remote)
        asked = kwargs.get("device")
        stays = remote
        if asked is not None:
            stays = torch.device(asked).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
            if func is aten._to_copy.default and stays != remote:
                kwargs.pop("non_blocking", None)
        elif remote and func is not aten.copy_.default:
            strangers = [x for x in tensors if not isinstance(x, Remote) and x.dim()]
            indexed = func in _INDEXING or func is aten.index_select.default
            if strangers and not indexed:
                raise RuntimeError(f"{func} on tensors of both devices")
        result = func(*tree_map(here, args), **tree_map(here, kwargs))
        out = kwargs.get("out")
        if out is not None:
            return out
        if func._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
            return args[0]
        wrap = lambda x: Remote(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return tree_map(wrap, result) if stays else result

    def _count(self, func, tensors, args, kwargs, remote: bool) -> None:
        name = func._schema.name.removeprefix("aten::")
        if func is aten._to_copy.default:
            asked = kwargs.get("device")
            there = remote if asked is None else torch.device(asked).type == DEVICE.type
            if remote and not there:
                self.waits["copied back"] += 1
            elif there and not remote and not kwargs.get("non_blocking"):
                self.waits["copied there at once"] += 1
        elif func is aten.copy_.default:
            source, asynchronous = args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking")
            if isinstance(args[0], Remote) != isinstance(source, Remote):
                if not isinstance(args[0], Remote):
                    self.waits["copied back"] += 1
                elif not asynchronous:
                    self.waits["copied there at once"] += 1
        elif not remote:
            return
        elif func is aten._local_scalar_dense.default:
            self.waits["read"] += 1
        elif func in _SIZED:
            self.waits[name] += 1
        elif func in _INDEXING:
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                self.waits["mask"] += 1
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.waits[name] += 1


class Copies:
    """How a `PinnedStaging` reaches this device; done at once."""

    class Done:
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            pass

    def allocate(self, elements: int) -> torch.Tensor:
        return torch.full((elements,), -(2**31), dtype=torch.int32)

    def send(self, host: torch.Tensor):
        return host.to(DEVICE, non_blocking=True), self.Done()

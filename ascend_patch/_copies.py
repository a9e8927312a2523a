"""Copies of a call's tensors, so that it can be made twice; imports torch when it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A cache that both would write to is not copied behind the server's back.
LARGEST_COPY = 1 << 30


class NotComparable(Exception):
    """This call cannot be made twice; the message says why."""


class Copies:
    """Copies of tensors, however deep in tuples, lists and dicts; everything else is shared."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._bytes = 0

    def of(self, value: Any) -> Any:
        """The value with its tensors copied; one that is met twice has one copy.

        Raises:
            NotComparable: A tensor holds no data, or the copies would be larger than a GiB.
        """
        import torch

        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.of(item) for item in value))
        if type(value) is dict:
            return {key: self.of(item) for key, item in value.items()}
        return value

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(argument, its copy) for every tensor that was met."""
        yield from self._copies.values()

    def hand_over(self, result: Any) -> Any:
        """Make the arguments what the copies became; a result that is a copy is the argument."""
        import torch

        for argument, copy in self.pairs():
            if not torch.equal(argument, copy):
                argument.copy_(copy)
        arguments = {id(copy): argument for argument, copy in self.pairs()}
        if type(result) in (tuple, list):
            return type(result)(arguments.get(id(item), item) for item in result)
        return arguments.get(id(result), result)

    def _of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        known = self._copies.get(id(tensor))
        if known is not None:
            return known[1]
        if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
            raise NotComparable("an argument is a tensor without data")
        self._bytes += tensor.numel() * tensor.element_size()
        if self._bytes > LARGEST_COPY:
            raise NotComparable(f"its arguments are larger than {LARGEST_COPY >> 20} MiB")
        copy = _copy(tensor.detach())
        self._copies[id(tensor)] = tensor, copy
        return copy


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, as kernels choose their way by them."""
    import torch

    copy = tensor.clone()
    if copy.stride() == tensor.stride() or tensor.layout is not torch.strided:
        return copy
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        return copy
    strided = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return strided.copy_(tensor)


def memory(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins; views of it have the same."""
    address: int = tensor.untyped_storage().data_ptr()
    return address


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in it, however deep."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))

"""What every public kernel function refuses before it looks further, as sentences.

Kinds, gradients, devices and memory that is written to twice: nothing here reads device memory, and
nothing has been written when an error is raised. What a host knows of values (lengths, slots that
lie on a CPU) is checked where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_tensors(
    operator: str,
    needed: Mapping[str, object],
    optional: Mapping[str, object] | None = None,
) -> None:
    """Hold a call's tensors to be tensors, on one device, that need no gradient.

    Args:
        operator: Its public name, for the message.
        needed: Tensors by their names in the call.
        optional: Those that may be None.

    Raises:
        TypeError: One is no tensor.
        ValueError: One requires a gradient while gradients are recorded, or two are on different
            devices.
    """
    recorded = torch.is_grad_enabled()
    first: tuple[str, torch.device] | None = None
    for given, may_be_none in ((needed, False), (optional or {}, True)):
        for name, x in given.items():
            if x is None and may_be_none:
                continue
            if not isinstance(x, Tensor):
                kind = "None" if x is None else f"a {type(x).__name__}"
                raise TypeError(f"{name} must be a tensor, not {kind}.")
            if recorded and x.requires_grad:
                raise ValueError(
                    f"{operator} has no gradient, and {name} requires one: call it under "
                    f"torch.inference_mode() or torch.no_grad(), or pass {name}.detach()."
                )
            if first is None:
                first = name, x.device
            elif x.device != first[1]:
                raise ValueError(
                    f"{name} is on {x.device} but {first[0]} is on {first[1]}; all must be on one "
                    "device: move it there once, not in each call."
                )


def check_written(name: str, x: Tensor) -> None:
    """Refuse memory in which several elements are one: what is written last would stay.

    Raises:
        ValueError: It is an expanded tensor.
    """
    # A shape of which nothing is repeated has no stride of 0, but in a dimension of one.
    if 0 in x.stride() and any(
        size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} is written to, and its strides {x.stride()} for {tuple(x.shape)} let several "
            "elements share memory: pass a tensor of its own."
        )


def check_apart(
    written: str, out: Tensor, given: Mapping[str, Tensor | None], *, itself: bool = False
) -> None:
    """Refuse an output that shares memory with what is read.

    Args:
        written: The output's name.
        out: The output.
        given: What is read, by names.
        itself: Whether it may be one of them, element for element.

    Raises:
        ValueError: It overlaps one.
    """
    for name, x in given.items():
        if x is not None and overlap(out, x) and not (itself and _same_view(out, x)):
            raise ValueError(
                f"{written} shares memory with {name}, which would be written before it is read: "
                "pass memory of its own."
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share bytes. Rows of one width that lie beside each other do not."""
    # Tensors without memory (meta and fake ones) have no storage to share.
    if a.numel() == 0 or b.numel() == 0 or a.is_meta or b.is_meta:
        return False
    if type(a) is not Tensor or type(b) is not Tensor:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = [_span(x) for x in (a, b)]
    if spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]:
        return False
    return not _are_columns(a, b)


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and the one past the last, of the storage."""
    size = x.element_size()
    first = x.storage_offset() * size
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return first, first + (reach + 1) * size


def _are_columns(a: Tensor, b: Tensor) -> bool:
    """Whether both are slices of the same rows, as q and k are of qkv, with no column shared."""
    row = max(max(x.stride()) * x.element_size() for x in (a, b))
    places = []
    for x in (a, b):
        size = x.element_size()
        dims = [(n, step * size) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
        rows = [(n, step) for n, step in dims if step >= row]
        width = sum((n - 1) * step for n, step in dims if step < row) + size
        if any(step % row for _, step in rows):
            return False
        first = x.storage_offset() * size % row
        if first + width > row:
            return False
        places.append((first, first + width))
    return bool(places[0][1] <= places[1][0] or places[1][1] <= places[0][0])


def _same_view(a: Tensor, b: Tensor) -> bool:
    return bool(
        a.dtype == b.dtype
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def check_number(
    name: str, x: object, *, above: float | None = None, least: float | None = None
) -> float:
    """The number as a float.

    Raises:
        TypeError: It is no int or float.
        ValueError: It is too small, too large for a float, or NaN.
    """
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name} must be a number, not {x!r}.")
    try:
        found = float(x)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, not {x}.") from None
    low = (above is not None and not found > above) or (least is not None and not found >= least)
    if low or found != found:
        wanted = f"at least {least}" if least is not None else "a number"
        wanted = f"above {above}" if above is not None else wanted
        raise ValueError(f"{name} must be {wanted}, not {x}.")
    return found


def on_host(x: Tensor | None) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    return bool(x is not None and x.device.type == "cpu" and type(x) is Tensor)


def _short(values: Tensor) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return f"[{shown}{', ...' if values.numel() > 8 else ''}]"


def check_slots(name: str, indices: Tensor | None, slots: int, *, negative: bool = True) -> None:
    """Refuse slots that a cache does not have, where the host can read them without waiting.

    Args:
        name: Of the argument.
        indices: int, any shape.
        slots: How many there are.
        negative: Whether one below 0 means none.

    Raises:
        ValueError: One is out of range.
    """
    if indices is None or not on_host(indices) or not indices.numel():
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(indices))
    if highest >= slots or (lowest < 0 and not negative):
        found = highest if highest >= slots else lowest
        raise ValueError(
            f"{name} names slot {found}, and the cache has {slots}"
            + ("; one below 0 means none." if negative else ".")
        )


def check_starts(
    name: str,
    starts: Tensor,
    tokens: int,
    sequences: int | None = None,
    *,
    from_zero: bool = False,
) -> None:
    """Refuse sequences that do not lie in the tokens, where the host can read where they begin.

    Args:
        name: Of the argument.
        starts: int [N + 1], or longer.
        tokens: How many there are.
        sequences: N; all of ``starts`` if None.
        from_zero: Whether the first one must begin at 0.

    Raises:
        ValueError: It begins below 0, falls, or goes past the tokens.
    """
    if not on_host(starts) or not starts.numel():
        return
    found = starts if sequences is None else starts[: sequences + 1]
    first, last = int(found[0]), int(found[-1])
    # Compared and not subtracted: a difference of int32 may not be one.
    falls = found.numel() > 1 and bool((found[1:] < found[:-1]).any())
    if first < 0 or falls or (from_zero and first):
        where = "at 0" if from_zero else "at 0 or later"
        raise ValueError(f"{name} must begin {where} and never fall, not {_short(found)}.")
    if last > tokens:
        raise ValueError(f"{name} ends at token {last}, but there are {tokens} tokens.")

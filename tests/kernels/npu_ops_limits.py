"""How tests of an operator's limits are written: a call that it takes, and one change to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend_patch.kernels.npu_ops.errors import OperatorError
from ascend_patch.kernels.npu_ops.settings import settings


def bytes_of(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def snapshot(call: dict[str, Any]) -> dict[str, bytes]:
    return {n: bytes_of(x) for n, x in call.items() if torch.is_tensor(x) and x.dim()}


def assert_refused(
    function: Callable[..., Any],
    call: dict[str, Any],
    changes: dict[str, Any],
    sentence: str,
    **options: Any,
) -> None:
    """The call is taken, the changed one is not: it says why and has touched nothing.

    ``changes``: values, or functions of the value that the call has. ``options`` are settings of
    the changed call; those of the first are the defaults.
    """
    function(**{n: x.clone() if torch.is_tensor(x) else x for n, x in call.items()})
    changed = dict(call)
    for name, change in changes.items():
        changed[name] = change(call[name]) if callable(change) else change
    before = snapshot(changed)
    name = function.__name__.removesuffix("_out")
    with settings(**options), pytest.raises(OperatorError) as raised:
        function(**changed)
    said = str(raised.value)
    assert said.startswith(f"{name}: "), said
    assert re.search(sentence, said), said
    assert snapshot(changed) == before

"""Breaks the gated delta rule on demand, in a running server: what a comparison must notice.

A vLLM plugin (this folder goes on PYTHONPATH), so it reaches every worker and the shim knows
nothing of it. It stands in front of the kernels that the shim has registered and reads the file
named in E2E_GDN_FAULT_FILE at each call: a fault of `FAULTS`; anything else changes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATORS = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
# sigmoid of it is 0, in any dtype.
CLOSED = -1e4


def close_gates(call: Any) -> Any:
    """Beta is 0: nothing is written to the state."""
    # Inputs of the gates, where they are not computed yet.
    raw = getattr(call, "raw", False)
    return dataclasses.replace(call, beta=call.beta.new_full(call.beta.shape, CLOSED if raw else 0))


def lose_state(call: Any) -> Any:
    """A prompt's later parts, and what follows a cached prefix, begin with nothing."""
    if not hasattr(call, "has_initial_state"):
        return call
    nobody = call.has_initial_state.new_zeros(call.has_initial_state.shape)
    return dataclasses.replace(call, has_initial_state=nobody)


FAULTS: dict[str, Callable[[Any], Any]] = {"beta": close_gates, "state": lose_state}


def install() -> None:
    file = os.environ.get("E2E_GDN_FAULT_FILE")
    if not file:
        return
    from ascend_patch.kernels import dispatch, gdn

    assert gdn.chunk_gated_delta_rule  # its implementations are registered now
    for operator in OPERATORS:
        real = next(i for i in dispatch.candidates(operator, "cpu") if i.name == "reference")
        run = breakable(real.run, Path(file))
        # One with the same name takes its predecessor's place.
        dispatch.register(operator, dispatch.ANY_DEVICE, dataclasses.replace(real, run=run))


def breakable(run: Callable[[Any], None], file: Path) -> Callable[[Any], None]:
    def broken(call: Any) -> None:
        run(FAULTS.get(read(file), lambda call: call)(call))

    return broken


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

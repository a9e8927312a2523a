"""Breaks the rotary kernels on demand, in a running server: what a comparison must notice.

A vLLM plugin (this folder goes on PYTHONPATH), so it reaches every worker and the shim knows
nothing of it. It stands in front of the implementations that the shim has registered and reads
the file named in E2E_FAULT_FILE at each call: a fault of `FAULTS`; anything else changes nothing.
Operator bodies run as Python in compiled graphs too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path

FACTOR = 2.0
# Each is looked up under its module's OPERATOR.
MODULES = ("ops", "angles_ops", "fused_ops")


def negate_sines(call: dict) -> None:
    if "sin" in call:
        call["sin"] = -call["sin"]
        return
    cos, sin = call["cos_sin_cache"].chunk(2, dim=-1)
    call["cos_sin_cache"] = cos.new_empty(call["cos_sin_cache"].shape)
    for half, value in zip(call["cos_sin_cache"].chunk(2, dim=-1), (cos, -sin), strict=True):
        half.copy_(value)


def scale(call: dict) -> None:
    for name in ("sin", "cos", "cos_sin_cache"):
        if name in call:
            call[name] = call[name] * FACTOR


def swap_axes(call: dict) -> None:
    """Height for width, which only an image's tokens can tell apart."""
    call["positions"] = call["positions"][[0, 2, 1]]


def always(call: dict) -> bool:
    return True


def takes_axes(call: dict) -> bool:
    """MRoPE: positions of time, height and width."""
    return "positions" in call and call["positions"].dim() == 2


def takes_angles(call: dict) -> bool:
    """The form of vision towers."""
    return "sin" in call


# A fault's name: where it strikes, and how.
FAULTS: dict[str, tuple[Callable[[dict], bool], Callable[[dict], None]]] = {
    "sine": (always, negate_sines),
    "factor": (always, scale),
    "mrope-sine": (takes_axes, negate_sines),
    "mrope-axes": (takes_axes, swap_axes),
    "vision-sine": (takes_angles, negate_sines),
}


def install() -> None:
    file = os.environ.get("E2E_FAULT_FILE")
    if not file:
        return
    from ascend_patch.kernels import dispatch

    for name in MODULES:
        operator = importlib.import_module(f"ascend_patch.kernels.rope.{name}").OPERATOR
        real = next(i for i in dispatch.candidates(operator, "cpu") if i.name == "reference")
        run = breakable(real.run, Path(file))
        # One with the same name takes its predecessor's place.
        dispatch.register(operator, dispatch.ANY_DEVICE, dataclasses.replace(real, run=run))


def breakable(run: Callable, file: Path) -> Callable:
    names = tuple(inspect.signature(run).parameters)

    def broken(*arguments: object) -> None:
        call = dict(zip(names, arguments, strict=True))
        strikes, break_it = FAULTS.get(read(file), (always, lambda call: None))
        if strikes(call):
            break_it(call)
        run(**call)

    return broken


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

"""Launches of Triton kernels on npu tensors: on the same memory, in order with everything else.

A launch waits for the replays before it, as every operator does, and is recorded in a graph that is
being captured; a replay runs it again, on the same memory, which as for operators is the graph's
or the caller's to keep. The trace names it `triton::<kernel>`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton.runtime.interpreter as interpreter

from softnpu.install import library

Executor = interpreter.GridExecutor
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_runtime = ctypes.CDLL("libascendcl.so")
_recorded: dict[int, Callable[[], None]] = {}  # by a number that the graph keeps
_numbers = itertools.count(1)


def install() -> None:
    """Let the interpreter run kernels on npu tensors, from now on."""
    run = Executor.__call__

    def call(self: Executor, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        aliased = [_alias(one, name) for one in args]
        named = {key: _alias(one, name) for key, one in kwargs.items()}

        def launch() -> None:
            library().softnpu_trace(f"triton::{name}".encode())
            run(self, *aliased, **named)

        _runtime.softnpu_flush()
        if _runtime.softnpu_is_capturing():
            number = next(_numbers)
            _recorded[number] = launch
            _runtime.softnpu_record(_replay, _forget, ctypes.c_void_p(number))
        launch()

    Executor.__call__ = call
    # It would copy each argument back into its own memory.
    Executor._restore_args_dev = lambda *_: None


@_CALL
def _replay(number: int) -> None:
    try:
        _recorded[number]()
    except BaseException:
        # ctypes would print this and go on, with results that nobody computed.
        traceback.print_exc()
        print("software NPU: a Triton kernel failed in a replay; ending", file=sys.stderr)
        sys.stderr.flush()
        os._exit(70)


@_CALL
def _forget(number: int) -> None:
    _recorded.pop(number, None)


def _alias(argument: Any, kernel: str) -> Any:
    """Return an argument with CPU tensors over the memory of npu tensors."""
    if isinstance(argument, tuple):
        made = [_alias(one, kernel) for one in argument]
        return type(argument)(*made) if hasattr(argument, "_fields") else tuple(made)
    if not isinstance(argument, torch.Tensor):
        if hasattr(argument, "data_ptr") or hasattr(argument, "base"):
            raise NotImplementedError(
                f"software NPU: Triton kernel {kernel} got a {type(argument).__name__}; only "
                "tensors, numbers and tuples of them are there"
            )
        return argument
    if argument.device.type != "npu":
        raise ValueError(
            f"software NPU: Triton kernel {kernel} got a tensor on {argument.device}; a kernel "
            "reads the memory of its device alone"
        )
    storage = argument.untyped_storage()
    alias = torch.empty(0, dtype=argument.dtype)
    if not storage.nbytes():
        return alias.reshape(argument.size())
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    shared = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return alias.set_(shared, argument.storage_offset(), argument.size(), argument.stride())

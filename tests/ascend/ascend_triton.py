"""vllm-ascend's own Triton kernels on CPU tensors: Triton's interpreter, with what Ascend adds.

Import it before anything that imports triton. Three things are Ascend's and not in the
interpreter: blocks of any size, arithmetic in bfloat16, and the slices that the kernels cut from
blocks. They are given the meaning that Triton for Ascend documents; the kernels' bodies are the
release's own.
"""

from __future__ import annotations

import os

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import numpy
import torch
import triton._utils
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

# Set to model what nothing in the kernel forbids: a scalar read from a tile that sees what was
# there an iteration before, because the load that fills it has not finished.
READS_LATE = False

_tiles: dict[str, object] = {"program": None, "held": None, "before": None}


def _any_size(shape: list[int]) -> int:
    return int(numpy.prod(shape)) if shape else 1


def _arange(self, start: int, end: int, *, ret_ty=None):
    start, end = int(start), int(end)
    block = tl.block_type(tl.int32, [end - start])
    handle = self.builder.create_make_range(block.to_ir(self.builder), start, end)
    return tl.tensor(handle, block)


def _widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
    bits = numpy.ascontiguousarray(x.data).astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)


def _rounded(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """float32 to the nearest bfloat16, ties to even; the interpreter's own cast truncates."""
    wide = torch.from_numpy(numpy.array(x.data, dtype=numpy.float32))
    bits = wide.to(torch.bfloat16).view(torch.int16).numpy().view(numpy.uint16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def _in_bfloat16(method):
    """The builder's method, taking bfloat16 through float32 and rounding once."""

    def call(self, *operands):
        if operands[0].dtype.scalar != tl.bfloat16:
            return method(self, *operands)
        found = method(self, *(_widened(x) for x in operands))
        return _rounded(found) if found.data.dtype == numpy.float32 else found

    return call


def _cast(self, source, target, original=interpreter.InterpreterBuilder.cast_impl):
    found, wanted = source.dtype.scalar, target.scalar
    if found == tl.bfloat16 and wanted != tl.bfloat16:
        return (
            original(self, _widened(source), target) if wanted != tl.float32 else _widened(source)
        )
    if wanted == tl.bfloat16 and found != tl.bfloat16:
        return _rounded(source)
    return original(self, source, target)


def _block(data: numpy.ndarray, scalar: tl.dtype) -> tl.tensor:
    handle = interpreter.TensorHandle(numpy.ascontiguousarray(data), scalar)
    return tl.tensor(handle, tl.block_type(scalar, list(data.shape)))


def _where(offsets, sizes, strides) -> tuple[slice, ...]:
    offsets, sizes, strides = ([int(_plain(n)) for n in ns] for ns in (offsets, sizes, strides))
    return tuple(slice(o, o + n * s, s) for o, n, s in zip(offsets, sizes, strides, strict=True))


def _plain(number):
    if isinstance(number, tl.tensor):
        return number.handle.data.item()
    return getattr(number, "value", number)


def extract_slice(block, offsets, sizes, strides):
    return _block(block.handle.data[_where(offsets, sizes, strides)], block.dtype.scalar)


def insert_slice(block, piece, offsets, sizes, strides):
    scalar = block.dtype.scalar
    builder = interpreter.interpreter_builder
    same = piece.handle if piece.dtype.scalar == scalar else builder.cast_impl(piece.handle, scalar)
    data = block.handle.data.copy()
    data[_where(offsets, sizes, strides)] = same.data
    return _block(data, scalar)


def get_element(block, index):
    program = interpreter.interpreter_builder.grid_idx
    if block is not _tiles["held"]:
        same = program == _tiles["program"]
        _tiles.update(before=_tiles["held"] if same else block, held=block, program=program)
    seen = _tiles["before"] if READS_LATE else block
    data = seen.handle.data[tuple(int(_plain(i)) for i in index)]
    return tl.tensor(interpreter.TensorHandle(numpy.array([data]), block.dtype.scalar), tl.int64)


def _install() -> None:
    triton._utils.validate_block_shape = _any_size
    tl.core.validate_block_shape = _any_size
    TritonSemantic.arange = _arange
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    for name in ("fadd", "fsub", "fmul", "fdiv", "fneg"):
        name = f"create_{name}"
        setattr(builder, name, _in_bfloat16(getattr(builder, name)))
    for function in (extract_slice, insert_slice, get_element):
        setattr(tl, function.__name__, function)


_install()

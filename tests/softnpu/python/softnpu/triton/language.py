"""What Triton for Ascend has and Triton's interpreter (3.6) lacks.

Blocks of any size, not powers of two alone; slices that kernels cut from blocks (`extract_slice`,
`insert_slice`, `get_element`); and bfloat16. The interpreter holds bfloat16 as the integers of its
bits and would compute with those: sums, products, comparisons, functions and matrix products of
bfloat16 are computed in float32 here, and rounded once, to the nearest, ties to even.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import triton._utils
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.semantic import TritonSemantic

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
# The builder's methods with operands of one floating type and a result of it, or of booleans.
ARITHMETIC = (
    "fadd", "fsub", "fmul", "fdiv", "frem", "fneg", "fma", "precise_divf", "clampf",
    "minimumf", "maximumf", "minnumf", "maxnumf",
    "fcmpOLT", "fcmpOGT", "fcmpOLE", "fcmpOGE", "fcmpOEQ", "fcmpONE",
    "fcmpULT", "fcmpUGT", "fcmpULE", "fcmpUGE", "fcmpUEQ", "fcmpUNE",
    "exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "precise_sqrt", "rsqrt", "floor", "ceil",
    "erf",
)  # fmt: skip


def install() -> None:
    """Change the interpreter of this process; before the first kernel is launched."""
    for module in (triton._utils, tl.core):
        module.validate_block_shape = _block_elements
    TritonSemantic.arange = _arange
    for name in ARITHMETIC:
        method = getattr(Builder, f"create_{name}", None)
        if method is not None:  # fneg is not in every Triton
            setattr(Builder, f"create_{name}", _in_float32(method))
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _converted(Builder.create_fp_to_fp)
    Builder.create_dot = _dot(Builder.create_dot)
    Builder.create_atomic_rmw = _no_bfloat16(Builder.create_atomic_rmw)
    interpreter.ReduceScanOpInterface.check_tensor = _no_bfloat16_reduced(
        interpreter.ReduceScanOpInterface.check_tensor
    )
    for function in (extract_slice, insert_slice, get_element):
        setattr(tl, function.__name__, function)


def extract_slice(
    ful: tl.tensor, offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any]
) -> tl.tensor:
    """The elements of a block at offsets + i * strides, i below sizes."""
    return _block(ful.handle.data[_slices(ful, offsets, sizes, strides)], ful.dtype.scalar)


def insert_slice(
    ful: tl.tensor,
    sub: tl.tensor,
    offsets: Sequence[Any],
    sizes: Sequence[Any],
    strides: Sequence[Any],
) -> tl.tensor:
    """A block with `sub` in place of what `extract_slice` gives, in the block's dtype."""
    scalar, data = ful.dtype.scalar, ful.handle.data.copy()
    same = sub.dtype.scalar == scalar
    piece = sub.handle if same else interpreter.interpreter_builder.cast_impl(sub.handle, scalar)
    data[_slices(ful, offsets, sizes, strides)] = piece.data
    return _block(data, scalar)


def get_element(src: tl.tensor, indice: Sequence[Any]) -> tl.tensor:
    """One element of a block, as a scalar of the block's dtype."""
    data = src.handle.data[tuple(_number(i) for i in indice)]
    scalar = src.dtype.scalar
    return tl.tensor(Handle(numpy.array([data]), scalar), scalar)


def _number(value: Any) -> int:
    if isinstance(value, tl.tensor):
        return int(value.handle.data.item())
    return int(getattr(value, "value", value))


def _slices(
    block: tl.tensor, offsets: Sequence[Any], sizes: Sequence[Any], strides: Sequence[Any]
) -> tuple[slice, ...]:
    found = []
    shape = block.handle.data.shape
    for length, *one in zip(shape, offsets, sizes, strides, strict=True):
        offset, size, stride = map(_number, one)
        # numpy would cut what goes beyond the block, and count from the end below 0.
        if offset < 0 or stride < 1 or offset + (size - 1) * stride >= length:
            raise ValueError(
                f"a slice of {size} elements from {offset} by {stride} does not lie in a block "
                f"of {length}"
            )
        found.append(slice(offset, offset + (size - 1) * stride + 1, stride))
    return tuple(found)


def _block(data: numpy.ndarray, scalar: tl.dtype) -> tl.tensor:
    handle = Handle(numpy.ascontiguousarray(data), scalar)
    return tl.tensor(handle, tl.block_type(scalar, list(data.shape)))


def _block_elements(shape: Sequence[Any]) -> int:
    return math.prod(_number(size) for size in shape)


def _arange(self: TritonSemantic, start: Any, end: Any, *, ret_ty: Any = None) -> tl.tensor:
    start, end = _number(start), _number(end)
    if end <= start:
        raise ValueError(f"arange's end {end} is not greater than its start {start}")
    block = tl.block_type(tl.int32, [end - start])
    handle = self.builder.create_make_range(block.to_ir(self.builder), start, end)
    return tl.tensor(handle, block)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def widened(handle: Handle) -> Handle:
    """Return bfloat16 as float32, which holds it exactly."""
    bits = handle.data.astype(numpy.uint32) << 16
    return Handle(bits.view(numpy.float32), tl.float32)


def rounded(handle: Handle) -> Handle:
    """Return float32 as bfloat16: to the nearest, ties to even; NaN stays NaN."""
    wide = numpy.ascontiguousarray(handle.data, dtype=numpy.float32)
    bits = wide.view(numpy.uint32)
    near = bits + (0x7FFF + ((bits >> 16) & 1))
    found = numpy.where(numpy.isnan(wide), bits | 0x400000, near) >> 16
    return Handle(found.astype(numpy.uint16), tl.bfloat16)


def _in_float32(method: Callable[..., Handle]) -> Callable[..., Handle]:
    @functools.wraps(method)
    def call(self: Builder, *operands: Any) -> Handle:
        if not any(map(_is_bfloat16, operands)):
            return method(self, *operands)
        found = method(self, *(widened(x) if _is_bfloat16(x) else x for x in operands))
        return rounded(found) if found.data.dtype == numpy.float32 else found

    return call


def _cast(cast: Callable[..., Handle]) -> Callable[..., Handle]:
    def call(self: Builder, source: Handle, target: Any) -> Handle:
        found, wanted = source.dtype.scalar, target.scalar
        if found == wanted or tl.bfloat16 not in (found, wanted):
            return cast(self, source, target)
        if found == tl.bfloat16:
            wide = widened(source)
            return wide if wanted == tl.float32 else cast(self, wide, target)
        # The interpreter's own would drop the lower bits.
        return rounded(source if found == tl.float32 else cast(self, source, tl.float32))

    return call


def _converted(convert: Callable[..., Handle]) -> Callable[..., Handle]:
    def call(self: Builder, source: Handle, target: Any, rounding: Any) -> Handle:
        pair = (source.dtype.scalar, target.scalar)
        if tl.bfloat16 in pair and rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(source, target)
        return convert(self, source, target, rounding)

    return call


def _dot(dot: Callable[..., Handle]) -> Callable[..., Handle]:
    def call(self: Builder, a: Handle, b: Handle, *more: Any) -> Handle:
        a, b = (widened(x) if _is_bfloat16(x) else x for x in (a, b))
        return dot(self, a, b, *more)

    return call


def _no_bfloat16(atomic: Callable[..., Handle]) -> Callable[..., Handle]:
    def call(self: Builder, operation: Any, pointer: Handle, value: Handle, *more: Any) -> Handle:
        if _is_bfloat16(value):
            raise NotImplementedError("software NPU: atomic operations on bfloat16 are not there")
        return atomic(self, operation, pointer, value, *more)

    return call


def _no_bfloat16_reduced(check: Callable[..., None]) -> Callable[..., None]:
    def call(self: Any, inputs: Sequence[tl.tensor]) -> None:
        check(self, inputs)
        if any(_is_bfloat16(one.handle) for one in inputs):
            raise NotImplementedError(
                "software NPU: reductions and scans of bfloat16 are not there; convert to float32"
            )

    return call

"""Compile Triton kernels for Ascend without an NPU and without CANN, and execute them on x86.

Runs in an environment of its own, because triton-ascend answers to the name triton:

    pip install --no-deps triton-ascend==3.2.0 ascendnpu-ir==1.2.0
    pip install pybind11 'numpy<2.4' torch

Triton lowers to linalg, AscendNPU IR's bishengir-compile lowers that to HIVM with its buffers
planned; it reports what does not fit. Only its last step, HIVM to machine code, is part of CANN: a
script that copies the HIVM stands in for it. Execution lowers the linalg with upstream MLIR passes
instead (Debian: mlir-19-tools, llvm-19, gcc). Programs then run one after another.

The linalg form says what goes through global memory: a tally of it is called before each copy.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURE = os.environ.get("TRITON_ASCEND_ARCH", "Ascend910B3")
LLVM = Path("/usr/lib/llvm-19/bin")
STAND_IN = """#!/bin/sh
if [ "$1" = "--version" ]; then echo "hivmc 0.1.0 (0000000 2026-01-01)"; exit 0; fi
source="$1"
while [ $# -gt 0 ]; do [ "$1" = "-o" ] && target="$2"; shift; done
cp "$source" "$target.o"
"""
PASSES = (
    "--convert-elementwise-to-linalg",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--ownership-based-buffer-deallocation",
    "--canonicalize",
    "--buffer-deallocation-simplification",
    "--bufferization-lower-deallocations",
    "--canonicalize",
    "--convert-linalg-to-loops",
    "--convert-scf-to-cf",
    "--expand-strided-metadata",
    "--lower-affine",
    "--arith-expand=include-bf16=true",
    "--convert-arith-to-llvm",
    "--convert-math-to-llvm",
    "--convert-cf-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-index-to-llvm",
    "--reconcile-unrealized-casts",
)
# What MLIR calls for memref.copy between layouts: two unranked memrefs (rank, descriptor), where a
# descriptor is {allocated, aligned, offset, sizes[rank], strides[rank]}. And the tally.
SUPPORT = r"""
#include <stdint.h>
#include <string.h>
struct unranked { int64_t rank; int64_t *descriptor; };
static void walk(const char *from, char *to, int64_t rank, const int64_t *size, const int64_t *step,
                 const int64_t *to_step, int64_t width) {
  if (!rank) { memcpy(to, from, width); return; }
  for (int64_t i = 0; i < size[0]; i++)
    walk(from + i * step[0] * width, to + i * to_step[0] * width, rank - 1, size + 1, step + 1,
         to_step + 1, width);
}
void memrefCopy(int64_t width, struct unranked *from, struct unranked *to) {
  int64_t *a = from->descriptor, *b = to->descriptor, rank = from->rank;
  walk((char *)a[1] + a[2] * width, (char *)b[1] + b[2] * width, rank, a + 3, a + 3 + rank,
       b + 3 + rank, width);
}
int64_t tally[2];
void tally_read(int64_t bytes) { tally[0] += bytes; }
void tally_written(int64_t bytes) { tally[1] += bytes; }
"""
_COPY = re.compile(r"^ *memref\.copy (%\w+), %\w+ : (memref<[^>]*>*) to ")
_STORE = re.compile(
    r"^ *bufferization\.materialize_in_destination .* in writable (%\w+) : \(.*, (memref<.*>)\) ->"
)
_SCALAR = re.compile(r"^ *%\w+ = memref\.load (%\w+)\[.*\] : (memref<.*>)$")
_WIDTHS = {"f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i64": 8, "i8": 1, "i1": 1}


def activate() -> Path:
    """Put the stand-in and the compiler on PATH, and a driver without a device in place."""
    spec = importlib.util.find_spec("ascendnpuir")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tools = Path(next(iter(spec.submodule_search_locations)), "bin")
    for name in ("bishengir-compile", "bishengir-opt"):
        (tools / name).chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="ascend-offline-"))
    (folder / "hivmc").write_text(STAND_IN)
    (folder / "hivmc").chmod(0o755)
    os.environ["PATH"] = os.pathsep.join((str(folder), str(tools), os.environ["PATH"]))
    os.environ.pop("BISHENG_INSTALL_PATH", None)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")

    from triton.backends.ascend import driver
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver as runtime

    # The real ones build C++ against CANN or ask the device.
    driver.NPUUtils.__init__ = lambda self: None
    driver.NPUUtils.get_arch = lambda self: ARCHITECTURE

    class Offline(driver.NPUDriver):
        def get_current_target(self) -> Any:
            return GPUTarget("npu", ARCHITECTURE, 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

    runtime.set_active(Offline())
    return tools


def versions() -> str:
    """Of the compiler: part of what a cached result, and the committed table, is good for."""
    names = ("triton-ascend", "ascendnpu-ir")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def compile_kernel(kernel: Any, values: Any, constants: dict[str, Any]) -> Any:
    """What a launch would compile; `.asm` has "ttadapter" (linalg) and "npubin" (HIVM)."""
    return kernel.warmup(*values, grid=(1, 1, 1), **constants)


def unified_buffer(compiled: Any) -> int:
    """Bytes of unified buffer that the compiler planned: the end of its last allocation."""
    text = compiled.asm["npubin"]
    text = text.decode() if isinstance(text, bytes) else text
    # Constants are named after their value (%c128_i64), so an address can be read off its name.
    cast = re.compile(
        r"pointer_cast\((%c\d+_i64(?:, %c\d+_i64)*)\)[^:]*: "
        r"memref<([0-9x]*?)x?(bf16|f16|f32|i64|i32|i16|i8|i1)(?:, [^>]*?)?#hivm.address_space<ub>"
    )
    ends = [0]
    for addresses, shape, element in cast.findall(text):
        size = _WIDTHS[element]
        for extent in filter(None, shape.split("x")):
            size *= int(extent)
        ends += [int(address) + size for address in re.findall(r"%c(\d+)_i64", addresses)]
    return max(ends)


def with_tally(text: str) -> str:
    """The linalg form with a call before each access of global memory: how many bytes it is."""
    lines: list[str] = []
    for line in text.splitlines():
        for pattern, name in ((_COPY, "read"), (_SCALAR, "read"), (_STORE, "written")):
            found = pattern.match(line)
            if found:
                lines += _call(found[1], found[2], f"tally_{name}", scalar=pattern is _SCALAR)
        lines.append(line)
        if line.startswith("module"):
            lines += [f"func.func private @tally_{name}(index)" for name in ("read", "written")]
    return "\n".join(lines)


_serial = itertools.count()


def _call(memory: str, kind: str, name: str, scalar: bool) -> list[str]:
    """Lines that multiply the extents of a memref, known or not, and hand them to ``name``."""
    n = next(_serial)
    parts = re.match(r"memref<((?:[0-9?]+x)*)(\w+)", kind)
    assert parts is not None, kind
    extents = [] if scalar else parts[1].split("x")[:-1]
    lines = [f"%tally{n} = arith.constant {_WIDTHS[parts[2]]} : index"]
    total = f"%tally{n}"
    for axis, extent in enumerate(extents):
        one, product = f"%tally{n}_{axis}", f"%tally{n}_{axis}p"
        if extent == "?":
            lines.append(f"{one}a = arith.constant {axis} : index")
            lines.append(f"{one} = memref.dim {memory}, {one}a : {kind}")
        else:
            lines.append(f"{one} = arith.constant {extent} : index")
        lines.append(f"{product} = arith.muli {total}, {one} : index")
        total = product
    return [*lines, f"func.call @{name}({total}) : (index) -> ()"]


def build(compiled: Any, tools: Path) -> ctypes.CDLL:
    """The linalg form as a library of this machine: the kernel and the tally."""
    folder = Path(tempfile.mkdtemp(prefix="ascend-x86-"))
    text = re.sub(r', (mix_mode|parallel_mode) = "[a-z_]*"', "", compiled.asm["ttadapter"])
    (folder / "k.mlir").write_text(with_tally(text))
    (folder / "support.c").write_text(SUPPORT)
    steps = (
        (tools / "bishengir-opt", "k.mlir", *PASSES, "-o", "lowered.mlir"),
        (LLVM / "mlir-translate", "--mlir-to-llvmir", "lowered.mlir", "-o", "k.ll"),
        (LLVM / "llc", "-O2", "-relocation-model=pic", "-filetype=obj", "k.ll", "-o", "k.o"),
        ("gcc", "-O2", "-fPIC", "-shared", "-o", "k.so", "k.o", "support.c", "-lm"),
    )
    for step in steps:
        done = subprocess.run(list(map(str, step)), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{step[0]}: {done.stderr[-1500:]}"
    library = ctypes.CDLL(str(folder / "k.so"))
    shutil.rmtree(folder)
    return library


def execute(library: Any, kernel: Any, grid: tuple[int, int, int], values: Any) -> tuple[int, int]:
    """Call the function once a program; the bytes that were read and written.

    Tensors go in by their storage. What a launch folds into the code, integers of 1, is left out.
    """
    import torch

    def memref(pointer: int, elements: int) -> list[Any]:
        ends = [ctypes.c_void_p(pointer)] * 2
        return [*ends, ctypes.c_int64(0), ctypes.c_int64(elements), ctypes.c_int64(1)]

    arguments = memref(0, 0) + memref(0, 0)  # the lock and the workspace of the real launcher
    for parameter, value in zip(kernel.params, values, strict=False):
        if isinstance(value, torch.Tensor):
            room = value.untyped_storage().nbytes() // value.element_size()
            arguments += memref(value.data_ptr(), room - value.storage_offset())
        elif isinstance(value, float):
            arguments.append(ctypes.c_float(value))
        elif value != 1 or parameter.do_not_specialize:
            arguments.append(ctypes.c_int32(value))
    function = getattr(library, kernel.fn.__name__)
    function.restype = None
    tally = (ctypes.c_int64 * 2).in_dll(library, "tally")
    tally[:] = (0, 0)
    for z, y, x in itertools.product(*(range(extent) for extent in reversed(grid))):
        function(*arguments, *(ctypes.c_int32(n) for n in (*grid, x, y, z)))
    return tally[0], tally[1]

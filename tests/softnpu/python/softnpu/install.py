"""Gives the operators of torch_npu and vllm-ascend kernels, as soon as they are defined."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[4]
_library: ctypes.CDLL | None = None
_fragments: list[object] = []


def library() -> ctypes.CDLL:
    """Return libsoftnpu.so, loaded when it is first asked for; torch_npu has to be there."""
    global _library
    if _library is None:
        folder = os.environ.get("SOFTNPU_LIBRARIES")
        if not folder:
            raise RuntimeError(
                "SOFTNPU is set and SOFTNPU_LIBRARIES is not; start the process with "
                "tests/softnpu/run"
            )
        _library = ctypes.CDLL(os.path.join(folder, "libsoftnpu.so"))
        _library.softnpu_counts.restype = ctypes.c_char_p
    return _library


def after_torch_npu() -> None:
    """Install the semantics of npu:: and atb::, and the boxed kernel for all that has a kernel."""
    import torch_npu

    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))  # kernels/npu_ops is there
    from ascend_patch.kernels.npu_ops import surface
    from softnpu import operators

    allow = [name for name in os.environ.get("SOFTNPU_ALLOW", "").split(",") if name]
    surface.install(torch_npu.__version__.partition("+")[0], allow=allow)
    operators.install(("npu", "atb"))
    library().softnpu_install()


def after_vllm_ascend_c() -> None:
    """Install the semantics of _C_ascend, and the boxed kernel for them."""
    from softnpu import operators

    operators.install(("_C_ascend",))
    library().softnpu_install()


def define_schemas(path: str) -> None:
    """Define the operators of _C_ascend that a file names, a schema each line, without kernels."""
    import torch

    library = torch.library.Library("_C_ascend", "FRAGMENT")
    _fragments.append(library)  # an operator lives as long as what defined it
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        library.define(line)

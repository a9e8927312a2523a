"""Triton for Ascend on the software NPU: kernels run in Triton's interpreter, on npu memory.

Triton gets a backend `npu`, as an entry point of group `triton.backends` would give it, so that
vLLM's HAS_TRITON is true; it compiles nothing. SOFTNPU_TRITON=1 turns it on. Without it there is no
such backend, and vLLM and vllm-ascend take their branches without Triton.
"""

from __future__ import annotations


def after_backends() -> None:
    """Add the backend, once triton.backends has found those that are installed."""
    from triton.backends import Backend, backends

    from softnpu.triton.driver import Compiler, Driver

    backends["npu"] = Backend(compiler=Compiler, driver=Driver)


def after_triton() -> None:
    """Give the interpreter what Ascend adds to Triton, and launches on npu tensors."""
    from softnpu.triton import language, launch

    language.install()
    launch.install()

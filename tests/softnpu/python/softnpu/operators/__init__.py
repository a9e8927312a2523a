"""CPU semantics of operators that served models need and kernels/npu_ops lacks, one family a file.

Each family has KERNELS: qualified operator name to a function whose parameters are the schema's.
Outputs are rounded once, from float32; a call that the documentation rules out is refused with an
OperatorError. An operator without semantics here or in kernels/npu_ops is refused by the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softnpu.defects import injected
from softnpu.operators import (
    activations,
    blocks,
    experts,
    gdn,
    norms,
    quantization,
    rotary,
    sampling,
)

FAMILIES = (activations, blocks, experts, gdn, norms, quantization, rotary, sampling)
_registered: set[str] = set()
_libraries: list[torch.library.Library] = []


def kernels() -> dict[str, Callable[..., Any]]:
    """Qualified operator name to its semantics, of every family."""
    return {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}


def install(namespaces: tuple[str, ...]) -> None:
    """Register the kernels of the namespaces for the CPU, where an operator is defined.

    A release of vllm-ascend defines some of the operators of _C_ascend, and no other.
    """
    for name, kernel in kernels().items():
        namespace, _, rest = name.partition("::")
        if namespace not in namespaces or name in _registered or not _is_defined(name):
            continue
        kernel = injected(name, kernel)
        library = torch.library.Library(namespace, "IMPL")
        library.impl(rest, kernel, "CPU")
        if namespace == "_C_ascend":
            # The wheel's own Meta kernels are compiled for the torch that the release is made
            # for and crash under another one; these compute shapes from the same functions.
            library.impl(rest, kernel, "Meta", allow_override=True)
        _libraries.append(library)
        _registered.add(name)


def _is_defined(name: str) -> bool:
    base, _, overload = name.partition(".")
    found = torch._C._jit_get_schemas_for_operator(base)
    return any(schema.overload_name == overload for schema in found)

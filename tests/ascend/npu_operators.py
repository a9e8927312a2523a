"""torch_npu's operators on CPU tensors: the operator surface behind the real schemas.

Import it after torch_npu. `used` names what ran, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch_npu  # noqa: F401  it defines the operators

from ascend_patch.kernels.npu_ops import surface

# The torch_npu of these environments. Exactness is judged in float32, which not all of them take.
_surface = surface.install("2.13.0", allow=["float32"], record=True)


class _Names(Sequence):
    """The operators of the surface's calls, without their namespace."""

    def __len__(self) -> int:
        return len(_surface.calls)

    def __getitem__(self, index):
        names = [call.operator.partition("::")[2] for call in _surface.calls]
        return names[index]

    def clear(self) -> None:
        _surface.calls.clear()


used = _Names()

"""vLLM's rotation by given angles: ApplyRotaryEmb and the functions that were there before it.

Vision towers call it, and the rotary classes that select their angles themselves. In bfloat16 the
torch form of the releases rounds every product; where a layer asks for float32 (Keye, SigLIP,
dots.ocr), and in vLLM's CUDA kernel, it does not, and the original stays.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from ascend_patch.impl.left_to_host import count_traced
from ascend_patch.impl.rotary import DEVICES, DTYPES, PATCH
from ascend_patch.kernels.rope import apply_rotary

NOT_TAKEN = "heads or angles of a device, shape or dtype that the kernel does not take"


def forward(original: FunctionType) -> Any:
    """ApplyRotaryEmb.forward_native from 0.14 on, between vLLM's own pre- and post-processing."""

    def forward_native(self: Any, x: Any, cos: Any, sin: Any) -> Any:
        if self.enable_fp32_compute:
            return original(self, x, cos, sin)
        if not takes(x, cos, sin):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, x, cos, sin)
        x, cos, sin, shape, dtype = self._pre_process(x, cos, sin)
        output = apply_rotary(x, cos, sin, is_neox_style=self.is_neox_style)
        return self._post_process(output, shape, dtype)

    return forward_native


def forward_0_13(original: FunctionType) -> Any:
    """ApplyRotaryEmb.forward_native of 0.13, which has no pre- and post-processing."""

    def forward_native(self: Any, x: Any, cos: Any, sin: Any) -> Any:
        if self.enable_fp32_compute:
            return original(self, x, cos, sin)
        if not takes(x, cos, sin):
            count_traced(PATCH, NOT_TAKEN)
            return original(self, x, cos, sin)
        return apply_rotary(x, cos, sin, is_neox_style=self.is_neox_style)

    return forward_native


def dispatch(original: FunctionType) -> Any:
    """`apply_rotary_emb_dispatch` of 0.11 and 0.12, where it would take the torch form."""

    def apply_rotary_emb_dispatch(x: Any, cos: Any, sin: Any, is_neox_style: bool) -> Any:
        if x.device.type == "cuda":
            return original(x, cos, sin, is_neox_style)
        if not takes(x, cos, sin):
            count_traced(PATCH, NOT_TAKEN)
            return original(x, cos, sin, is_neox_style)
        return apply_rotary(x, cos, sin, is_neox_style=is_neox_style)

    return apply_rotary_emb_dispatch


def vision_0_12(original: FunctionType) -> Any:
    """`apply_rotary_pos_emb_vision` of 0.12; that of 0.11 computes in float32."""

    def apply_rotary_pos_emb_vision(t: Any, cos: Any, sin: Any) -> Any:
        if t.device.type == "cuda":
            return original(t, cos, sin)
        if not takes(t, cos, sin):
            count_traced(PATCH, NOT_TAKEN)
            return original(t, cos, sin)
        return apply_rotary(t, cos, sin, is_neox_style=True)

    return apply_rotary_pos_emb_vision


def takes(x: Any, cos: Any, sin: Any) -> bool:
    """Whether apply_rotary covers a call; the releases broadcast further shapes."""
    if x.dtype not in DTYPES or cos.dtype not in DTYPES or sin.dtype not in DTYPES:
        return False
    if x.device.type not in DEVICES or x.dim() not in (3, 4):
        return False
    return bool(cos.dim() == 2 or (cos.dim() == 3 and cos.shape[:-1] == x.shape[:-2]))

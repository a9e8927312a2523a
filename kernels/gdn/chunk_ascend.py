"""chunk_gated_delta_rule on an NPU: what the Triton kernels take there, and how they are launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

NAME = "triton"


def register() -> bool:
    """Offer the kernels on NPUs; whether this process has Triton for Ascend."""
    return False

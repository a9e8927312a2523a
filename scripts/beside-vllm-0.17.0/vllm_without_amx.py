"""Has vLLM 0.17.0 load its AVX2 library on CPUs whose AVX-512 has no AMX.

The wheel's AVX-512 library is compiled for AMX and ends with an illegal instruction elsewhere, and
vLLM asks torch for AVX-512 alone. Platform plugins are the first code of others that it calls.
"""

from __future__ import annotations

from pathlib import Path


def choose() -> None:
    """Answer vLLM's question in torch's place; name no platform."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if "amx_bf16" not in flags:
        import torch

        torch._C._cpu._is_avx512_supported = lambda: False

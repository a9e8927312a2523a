"""ASCEND_PATCHES_DEVICE=emulated in vLLM 0.18: its CPU platform chooses an NPU's attention path.

Decoder layers get `attention_vllm_backend`, which routes each batch as on an NPU and calls the
operator surface. Encoder-only layers, and whatever the routing table leaves to the host, keep
vLLM's own CPU attention, and one line of the log says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ascend_patch import _bootstrap
from ascend_patch.kernels.attention.case import HOST, Case
from ascend_patch.kernels.attention.route import route

BACKEND = "ascend_patch.impl.attention_vllm_backend.AscendAttentionBackend"
# In the routing table: CPU tensors behind the operator surface.
SYSTEM = "emulated"
# What the surface stands for: the torch_npu and the CANN of vllm-ascend 0.18.
TORCH_NPU, CANN = "2.9.0", "8.5"
BLOCK_SIZE = 128
# What a server's batches are in; there is no speculation in a CPU server.
STATES = ("prefill", "cache_hit", "chunked", "decode")


def get_attn_backend_cls(
    wrapped: Callable[..., str], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """CpuPlatform.get_attn_backend_cls: the path of the backend class for one layer."""
    # First: it has sentences of its own for MLA and sparse attention.
    theirs = wrapped(*args, **kwargs)
    asked, config = _arguments(*args, **kwargs)
    # A member of an enumeration of strings, or the string.
    kind = getattr(config.attn_type, "value", config.attn_type)
    reason = "" if kind == "decoder" else f"{kind} attention is vLLM's"
    reason = reason or _asked_for_vllms(asked) or refusal(config)
    if reason:
        _say(f"vLLM's own CPU attention runs, because {reason}")
        return theirs
    begin(str(config.dtype).removeprefix("torch."))
    return BACKEND


def _arguments(
    selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
) -> tuple[Any, Any]:
    return selected_backend, attn_selector_config


def _asked_for_vllms(asked: Any) -> str:
    return f"{asked.name} was asked for" if asked is not None and asked.name == "CPU_ATTN" else ""


def refusal(config: Any) -> str:
    """Why a decoder layer of this AttentionSelectorConfig is left to vLLM; empty if it is not."""
    if config.use_mm_prefix:
        return "the model attends to parts of its prompt in both directions"
    if config.block_size is not None and config.block_size % BLOCK_SIZE:
        return f"--block-size {config.block_size} is no multiple of {BLOCK_SIZE}"
    return refusal_of(
        head_size=config.head_size,
        sinks=config.has_sink,
        dtype=str(config.dtype).removeprefix("torch."),
        kv_dtype=config.kv_cache_dtype or "auto",
    )


def refusal_of(**fields: Any) -> str:
    """Why some batch of a layer is left to the host, given fields of its cases; empty if none."""
    found = (route(case_of(state, **fields)) for state in STATES)
    return next((one.reason for one in found if one.operator == HOST), "")


def case_of(state: str, **fields: Any) -> Case:
    """A case on the emulated device."""
    return Case(state, block_size=BLOCK_SIZE, soc=SYSTEM, torch_npu=TORCH_NPU, cann=CANN, **fields)


@cache
def begin(dtype: str) -> None:
    """Install the operator surface in this process, and register the backend's name.

    Fused inference attention has no float32: a model in float32 needs the surface's allowance,
    which this switches on and says so.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from ascend_patch.kernels.npu_ops import settings, surface

    # A model of a second dtype must not take away what the first one's layers need.
    allow = settings.current().allow | ({"float32"} if dtype == "float32" else set())
    surface.install(TORCH_NPU, cann=CANN, allow=allow)
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    _say(
        "decoder layers attend through the operator surface of torch_npu "
        f"{TORCH_NPU} and CANN {CANN}; it is slow, and meant for tests"
    )
    if dtype == "float32":
        _say(
            "no NPU's attention operator takes float32; the surface's allowance "
            "`float32` is on for this model"
        )


@cache
def _say(sentence: str) -> None:
    """Write a line on stderr, once a process: vLLM's workers show no other package's logging."""
    _bootstrap.complain(f"emulated device: {sentence}")

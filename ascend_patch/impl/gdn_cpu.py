"""What keeps vLLM from serving GDN models without Triton, each in its own place.

A CPU server has Triton's decorators and no Triton: a kernel that is reached is an error. The layers
get the bundled kernels, which are torch there; the worker's two Triton kernels only move bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_metadata, left_to_host
from ascend_patch.impl.gdn_core import core

# Attention's on a CPU: vLLM's default for it, and what the emulated device's operators take.
BLOCK_SIZE = 128


def forward_core(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Qwen3NextGatedDeltaNet._forward_core, and Qwen3.5's, from 0.16 on: states are [V, K]."""
    _forward_core(instance, *args, **kwargs)


def _forward_core(
    layer: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor
) -> None:
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    # A profile run. The release warms Triton's autotuner up then; there is none here.
    if context.attn_metadata is None:
        return
    conv_state, ssm_state = layer.kv_cache[context.virtual_engine]
    core(
        layer,
        mixed_qkv,
        b,
        a,
        core_attn_out,
        context.attn_metadata[layer.prefix],
        conv_state=conv_state.transpose(-1, -2),
        ssm_state=ssm_state,
        state_layout="VK",
    )


def build(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """GDNAttentionMetadataBuilder.build: with chunk tables, and with a prompt of one token in mind.

    The release takes a batch of one token each for decode. A request that begins then goes on from
    what the last owner has left in its slot: so the batch is prefill here, which knows who begins.
    """
    common = _common(*args, **kwargs)
    metadata = wrapped(*args, **kwargs)
    if metadata.spec_sequence_masks is None and metadata.num_prefills == 0:
        computed = common.compute_num_computed_tokens()
        if not computed.all():
            metadata.num_prefills, metadata.num_decodes = metadata.num_decodes, 0
            metadata.num_prefill_tokens, metadata.num_decode_tokens = (
                metadata.num_decode_tokens,
                0,
            )
            metadata.has_initial_state = computed > 0
    if metadata.num_prefills:
        starts = metadata.non_spec_query_start_loc
        gdn_metadata.attach(metadata, instance, starts, starts.device)
    return metadata


def _common(common_prefix_len: int, common_attn_metadata: Any, *_: Any, **__: Any) -> Any:
    return common_attn_metadata


def check_and_update_config(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """CpuPlatform.check_and_update_config: a hybrid model keeps a block that holds a state.

    Pages of attention and of states must be equal. HybridAttentionMambaModelConfig has made them so
    when the platform sets the block size back to 128 tokens; it is asked again, with a multiple of
    128 that is large enough.
    """
    config = _config(*args, **kwargs)
    # None in a configuration without a model.
    hybrid = config.model_config is not None and config.model_config.is_hybrid
    needed = config.cache_config.block_size if hybrid else None
    wrapped(*args, **kwargs)
    if needed is None or config.cache_config.user_specified_block_size:
        return
    from vllm.model_executor.models.config import HybridAttentionMambaModelConfig

    config.cache_config.block_size = -(-needed // BLOCK_SIZE) * BLOCK_SIZE
    HybridAttentionMambaModelConfig.verify_and_update_config(config)


def _config(vllm_config: Any) -> Any:
    return vllm_config


def dispatch_cpu_unquantized_gemm(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """layers.utils:dispatch_cpu_unquantized_gemm: a weight that is no matrix is not packed as one.

    The convolution's weight, [C, 1, W], lies in a linear layer; nobody multiplies by it.
    """
    layer = _layer(*args, **kwargs)
    if layer.weight.is_meta or layer.weight.dim() == 2:
        wrapped(*args, **kwargs)
    else:
        layer.cpu_linear = torch.nn.functional.linear


def _layer(layer: Any, remove_weight: bool) -> Any:
    return layer


def zero_block_ids(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """KVBlockZeroer.zero_block_ids: blocks of attention's cache, by address."""
    if instance._meta is None or _are_of_a_cpu(instance._meta[0]):
        _zero(instance, *args, **kwargs)
    else:
        wrapped(*args, **kwargs)


def _zero(zeroer: Any, block_ids: list[int]) -> None:
    if not block_ids or zeroer._meta is None:
        return
    # Sizes are in elements of 4 bytes, those of the release's kernel.
    addresses, elements = zeroer._meta[0].tolist(), zeroer._meta[1]
    for address in addresses:
        for block in block_ids:
            ctypes.memset(address + 4 * elements * block, 0, 4 * elements)


def batch_memcpy(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """mamba_utils:batch_memcpy: states of blocks to other blocks, with prefix caching."""
    if all(map(_are_of_a_cpu, (*args, *kwargs.values()))):
        _copy(*args, **kwargs)
    else:
        wrapped(*args, **kwargs)


def _copy(src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor) -> None:
    """Addresses int64 [N] and sizes in bytes int32 [N]."""
    copies = zip(src_ptrs.tolist(), dst_ptrs.tolist(), sizes.tolist(), strict=True)
    for source, destination, size in copies:
        ctypes.memmove(destination, source, size)


def _are_of_a_cpu(addresses: Tensor | None) -> bool:
    """Whether addresses may be written to from here: the releases keep them where they point to.

    An address of another device is none in this process, or that of something else.
    """
    if addresses is None or addresses.device.type == "cpu":
        return True
    left_to_host.count(
        gdn_metadata.PATCH,
        f"blocks lie on {addresses.device.type}, and not on a CPU: the release's own kernel moves "
        "them",
    )
    return False

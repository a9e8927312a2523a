"""The emulated device's attention backend in vLLM 0.18: routing and operators as on an NPU.

The cache is vLLM's NHD: [2, blocks, block_size, kv_heads, head_size], keys first. In hybrid models
vLLM lays keys and values of a block side by side in memory and keeps that shape.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl

from ascend_patch.impl.attention_vllm import BLOCK_SIZE, case_of, refusal_of
from ascend_patch.impl.attention_vllm_metadata import (
    AscendAttentionMetadataBuilder,
    AscendMetadata,
)
from ascend_patch.kernels.attention.attend import attend
from ascend_patch.kernels.attention.case import HOST, Route
from ascend_patch.kernels.attention.route import route


class AscendAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks of a backend before it has made a layer."""

    accept_output_buffer = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # Keys and values are written by an operator of their own.
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return AscendAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type:
        return AscendAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        return [BLOCK_SIZE]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return 2, num_blocks, block_size, num_kv_heads, head_size

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class AscendAttentionBackendImpl(AttentionImpl):  # type: ignore[misc]
    """One decoder layer.

    Raises:
        NotImplementedError: The layer needs what no operator here computes.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = str(getattr(attn_type, "value", attn_type))
        # Its keys are those that another layer has written.
        self.shares_cache = kv_sharing_target_layer_name is not None
        self.sinks = sinks
        # What layers are made in, as vLLM has it.
        dtype = _name(torch.get_default_dtype())
        reason = _not_here(alibi_slopes, logits_soft_cap)
        reason = reason or refusal_of(dtype=dtype, **self._fields())
        if reason:
            raise NotImplementedError(
                f"the emulated device cannot run this model: {reason} Run it without "
                "ASCEND_PATCHES_DEVICE=emulated."
            )
        self._kind = (
            num_heads,
            self.num_kv_heads,
            head_size,
            sliding_window,
            self.shares_cache,
            sinks is not None,
        )

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values; in a warm-up before there is any metadata.

        Args:
            key, value: [T, kv_heads, head_size]; more rows than slots in a padded batch.
            slot_mapping: Integers [slots]: block * block_size + place in the block; -1 for none.
        """
        if kv_cache.numel() == 0:
            return
        count = slot_mapping.shape[0]
        key_cache, value_cache = kv_cache.unbind(0)
        torch.ops.atb._npu_reshape_and_cache(
            key[:count], value[:count], key_cache, value_cache, slot_mapping.to(torch.int32)
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AscendMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, and return `output`.

        Args:
            query, output: [T, heads, head_size]; rows that belong to no request become 0.
            key, value: [T, kv_heads, head_size], of this step.
            attn_metadata: None in a warm-up.

        Raises:
            NotImplementedError: The case is left to the host, which here has no other backend.
        """
        assert output is not None
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the emulated device does not quantise attention's output")
        if attn_metadata is None:
            return output.fill_(0)
        found = attn_metadata.routes.get(self._kind)
        if found is None:
            found = attn_metadata.routes[self._kind] = self._route(attn_metadata, query.dtype)
        count = attn_metadata.batch.num_tokens
        output[count:].fill_(0)
        key_cache, value_cache = kv_cache.unbind(0)
        attend(
            found,
            attn_metadata.batch,
            query[:count],
            key[:count],
            value[:count],
            key_cache,
            value_cache,
            output[:count],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            scale=self.scale,
            sinks=self.sinks,
        )
        return output

    def _route(self, metadata: AscendMetadata, dtype: torch.dtype) -> Route:
        state = metadata.state
        if state == "prefill" and self.shares_cache:
            state = "chunked"
        found = route(
            case_of(
                state,
                causal=metadata.causal,
                pooling=metadata.pooling,
                dtype=_name(dtype),
                max_query_len=metadata.longest,
                min_query_len=metadata.shortest,
                max_seq_len=metadata.longest_context,
                batch=len(metadata.batch.seq_lens),
                padded=metadata.padded,
                **self._fields(),
            )
        )
        if found.operator == HOST:
            raise NotImplementedError(f"the emulated device cannot attend: {found.reason}")
        return found

    def _fields(self) -> dict[str, Any]:
        """What the layer's cases have in common."""
        return {
            "head_size": self.head_size,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "sliding_window": self.sliding_window,
            "sinks": self.sinks is not None,
            "attn_type": self.attn_type,
            "kv_dtype": self.kv_cache_dtype,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_here(alibi_slopes: list[float] | None, logits_soft_cap: float | None) -> str:
    for given, what in ((alibi_slopes, "ALiBi slopes"), (logits_soft_cap, "a soft cap")):
        if given:
            return f"No attention operator has {what}, which its layers need."
    return ""

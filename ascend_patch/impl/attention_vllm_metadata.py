"""What the emulated device's attention layers are told about a batch, built once a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder

from ascend_patch.kernels.attention.attend import Batch
from ascend_patch.kernels.attention.case import Route


@dataclass
class AscendMetadata:
    """One step of the requests of one KV-cache group.

    Attributes:
        state: Of `kernels.attention.case.STATES`.
        batch: The lists that operators take.
        causal: A query sees no key behind its own position.
        pooling: The model embeds or classifies.
        shortest, longest, longest_context: Tokens of the shortest and longest query that is not
            empty, and of the longest request.
        padded: There are tokens, or requests without any, that belong to nobody.
        routes: What each kind of layer's case was routed to; filled by the layers.
    """

    state: str
    batch: Batch
    causal: bool = True
    pooling: bool = False
    shortest: int = 0
    longest: int = 0
    longest_context: int = 0
    padded: bool = False
    routes: dict[tuple[Any, ...], Route] = field(default_factory=dict)


@dataclass(frozen=True)
class Speculation:
    """How a server speculates: vLLM's name of the method, and draft tokens a step."""

    method: str
    tokens: int


def state_of(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    *,
    chunked_prefill: bool,
    speculation: Speculation | None = None,
) -> str:
    """A batch's state, by the rules of vllm-ascend's model runner (0.13 and later).

    The runner knows how many tokens of each request are drafts; here a request that has a context
    and no more tokens than can be drafted, and one, counts as decoding.

    Args:
        query_lens: Tokens of this step for each request; 0 for one that only pads the batch.
        seq_lens: Those and the tokens in the cache.
        chunked_prefill: Whether the scheduler cuts prompts in parts.
        speculation: None in a server that does not speculate.
    """
    there = [(q, n) for q, n in zip(query_lens, seq_lens, strict=True) if q]
    # The rows of every other method are those of chunked prefill, and the runner says so.
    drafts = speculation.tokens if speculation and speculation.method == "mtp" else 0
    if all(q == n for q, n in there):
        return "prefill"
    if all(q == 1 for q, _ in there):
        # MTP's operator takes queries of one token or two alike.
        return "speculative" if drafts else "decode"
    if drafts and all(q <= min(1 + drafts, n - 1) for q, n in there):
        return "speculative"
    return "chunked" if chunked_prefill else "cache_hit"


class AscendAttentionMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes AscendMetadata of vLLM's CommonAttentionMetadata without reading device memory."""

    # A mixed batch is one call of the operator: nothing has to be moved to its front.
    reorder_batch_threshold = None
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.pooling = vllm_config.model_config.runner_type == "pooling"
        self.chunked_prefill = vllm_config.scheduler_config.enable_chunked_prefill
        speculative = vllm_config.speculative_config
        self.speculation = speculative and Speculation(
            speculative.method, speculative.num_speculative_tokens
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> AscendMetadata:
        """Return the metadata of one step.

        Args:
            common_prefix_len: Ignored: there is no cascade attention here.
            common_attn_metadata: query_start_loc_cpu [B + 1], seq_lens [B], block_table_tensor
                int32 [B, blocks].
            fast_build: Ignored.
        """
        common = common_attn_metadata
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        # The host's copy where there is one: `seq_lens_cpu` would read the device for it.
        kept = common.seq_lens if common._seq_lens_cpu is None else common._seq_lens_cpu
        seq_lens = kept[:count].tolist()
        query_lens = [end - start for start, end in itertools.pairwise(starts)]
        there = [length for length in query_lens if length]
        return AscendMetadata(
            state=state_of(
                query_lens,
                seq_lens,
                chunked_prefill=self.chunked_prefill,
                speculation=self.speculation,
            ),
            batch=Batch(
                query_ends=starts[1:],
                seq_lens=seq_lens,
                block_table=common.block_table_tensor[:count],
                num_tokens=common.num_actual_tokens,
            ),
            causal=common.causal,
            pooling=self.pooling,
            shortest=min(there, default=0),
            longest=max(there, default=0),
            longest_context=max(seq_lens, default=0),
            padded=len(there) < count or common.num_actual_tokens > starts[-1],
        )

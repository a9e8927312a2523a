"""GDNAttentionMetadataBuilder.build of vLLM 0.11 to 0.19 without a word from the device.

The release selects by boolean masks on the device and copies from pageable memory; each of these
makes the host wait for all that is enqueued. Every number is in the scheduler's copies on the CPU:
here they are put together there, and go out in one asynchronous copy. The fields are the release's
own, value for value.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ascend_patch.impl import gdn_begin, gdn_metadata, gdn_vllm_conv
from ascend_patch.impl.gdn_vllm_parcel import Parcel

MODULE = "vllm.v1.attention.backends.gdn_attn"
_KINDS = ("prefill", "decode", "spec_decode")
Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Release:
    """What sets a release's build apart.

    Attributes:
        token_masks: Tokens are told apart by a mask, and not by two lists (0.11.0).
        pads: It pads its batch for captured graphs itself; later the runner has (up to 0.12).
        finds_context: The batch has no `compute_num_computed_tokens` (up to 0.13).
        has_modes: The block table depends on the mode of prefix caching (from 0.15).
        counts_empty: A request without tokens is a prefill; later it is nothing (up to 0.16).
        either: Beside speculative requests one-token ones are prefills; 0.17 refuses such a batch.
    """

    token_masks: bool = False
    pads: bool = False
    finds_context: bool = False
    has_modes: bool = True
    counts_empty: bool = False
    either: bool = False


def build(
    release: Release,
    builder: Any,
    common_prefix_len: int,
    common_attn_metadata: Any,
    num_accepted_tokens: Tensor | None = None,
    num_decode_draft_tokens_cpu: Tensor | None = None,
    fast_build: bool = False,
    *,
    chunk_sizes: Sequence[int] = gdn_metadata.CHUNK_SIZES,
) -> Any:
    """Return the release's GDNAttentionMetadata, with chunk tables attached.

    Args:
        release: Whose.
        builder: Its GDNAttentionMetadataBuilder.
        common_prefix_len: Ignored, as the release does.
        common_attn_metadata: CommonAttentionMetadata of B requests, padding included.
        num_accepted_tokens: int32 [B] on the device.
        num_decode_draft_tokens_cpu: int32 [B] on the CPU, -1 for a request that does not decode.
        fast_build: Ignored, as the release does.
        chunk_sizes: Of the tables, in tokens.
    """
    module = importlib.import_module(MODULE)
    batch = _Batch(release, module, builder, common_attn_metadata)
    speculative = gdn_metadata.drafting(
        num_decode_draft_tokens_cpu, use_spec_decode=builder.use_spec_decode
    )
    if speculative is None:
        fields = batch.plain()
    else:
        assert num_accepted_tokens is not None
        fields = batch.speculative(speculative.numpy(), num_accepted_tokens)
    batch.prefill(fields)
    batch.decode(fields)
    batch.graphs(fields)
    lists = {}
    if release.token_masks and speculative is not None:
        lists = {name: fields.pop(name) for name in ("spec_token_indx", "non_spec_token_indx")}
    metadata = module.GDNAttentionMetadata(**fields)
    for name, tokens in lists.items():
        # For our layer, which is one for all releases.
        setattr(metadata, name, tokens)
    starts = torch.from_numpy(batch.rest_starts)
    gdn_metadata.attach(metadata, builder, starts, batch.device, chunk_sizes=chunk_sizes)
    return metadata


class _Batch:
    """One batch of B requests; what is known of it on the host, and how it reaches the device.

    Attributes:
        starts: [B + 1], query_start_loc.
        rest: [N], the non-speculative requests; None for all.
        rest_starts: [N + 1], where their tokens begin.
    """

    def __init__(self, release: Release, module: Any, builder: Any, common: Any) -> None:
        self.release, self.module = release, module
        self.builder, self.common = builder, common
        self.device: torch.device = common.query_start_loc.device
        self.starts: Numbers = common.query_start_loc_cpu.numpy()
        self.rest: Tensor | None = None
        self.rest_starts = self.starts
        self.table = self._table()

    def _table(self) -> Tensor:
        table: Tensor = self.common.block_table_tensor
        if not self.release.has_modes:
            return table
        found: Tensor = self.module.mamba_get_block_table_tensor(
            table,
            self.common.seq_lens,
            self.builder.kv_cache_spec,
            self.builder.vllm_config.cache_config.mamba_cache_mode,
        )
        return found

    def _send(self, *arrays: Numbers) -> list[Tensor]:
        parcel = Parcel()
        for array in arrays:
            parcel.put(array)
        return parcel.send(self.device, gdn_metadata.staging_of(self.builder, self.device))

    def plain(self) -> dict[str, Any]:
        """The fields of a batch in which nobody verifies drafts."""
        found = self.module.split_decodes_and_prefills(self.common, decode_threshold=1)
        decodes, prefills, decode_tokens, prefill_tokens = found
        return {
            **_counts(prefills, prefill_tokens, decodes, decode_tokens, 0, 0),
            "non_spec_state_indices_tensor": self.table[:, 0],
            "non_spec_query_start_loc": self.common.query_start_loc,
        }

    def speculative(self, chosen: Numbers, accepted: Tensor) -> dict[str, Any]:
        """The fields of a batch in which the ``chosen`` requests, bool [B], verify drafts."""
        lengths = np.diff(self.starts)
        rest = lengths[~chosen]
        count, width = int(chosen.sum()), self.builder.num_spec + 1
        decodes = int((rest == 1).sum())
        prefills = len(rest) - decodes
        if not self.release.counts_empty:
            prefills -= int((rest == 0).sum())
        rest_tokens = int(rest.sum())
        if self.release.either:
            prefills, decodes = prefills + decodes, 0
        fields = _counts(
            prefills,
            rest_tokens - decodes,
            decodes,
            decodes,
            count,
            int(lengths.sum()) - rest_tokens,
        )
        if prefills or decodes:
            self.rest_starts = _starts(rest)
            fields.update(self._mixed(chosen, lengths, width))
        else:
            fields.update(self._drafts_alone(chosen, count, width))
        rows = fields.pop("rows")
        fields["num_accepted_tokens"] = accepted.index_select(0, rows)
        return fields

    def _drafts_alone(self, chosen: Numbers, count: int, width: int) -> dict[str, Any]:
        """Requests that pad the batch are behind the others."""
        tokens = min(count * width, int(self.starts[-1]))
        mask, rows = self._send(chosen, np.flatnonzero(chosen))
        whole = self.release.counts_empty
        starts = self.common.query_start_loc
        return {
            **self._tokens(
                torch.arange(tokens, dtype=torch.int32, device=self.device),
                torch.empty(0, dtype=torch.int32, device=self.device),
                torch.ones(tokens, dtype=torch.bool, device=self.device),
            ),
            "rows": rows,
            "spec_sequence_masks": mask,
            "spec_state_indices_tensor": (
                self.table[:, :width] if whole else self.table[:, :width].index_select(0, rows)
            ),
            "spec_query_start_loc": starts if whole else starts[: count + 1],
        }

    def _mixed(self, chosen: Numbers, lengths: Numbers, width: int) -> dict[str, Any]:
        of_tokens = np.repeat(chosen, lengths)
        mask, rows, self.rest, token_mask, theirs, others, starts, rest_starts = self._send(
            chosen,
            np.flatnonzero(chosen),
            np.flatnonzero(~chosen),
            of_tokens,
            np.flatnonzero(of_tokens),
            np.flatnonzero(~of_tokens),
            _starts(lengths[chosen]),
            self.rest_starts,
        )
        return {
            **self._tokens(theirs, others, token_mask),
            "rows": rows,
            "spec_sequence_masks": mask,
            "spec_state_indices_tensor": self.table[:, :width].index_select(0, rows),
            "non_spec_state_indices_tensor": self.table[:, 0].index_select(0, self.rest),
            "spec_query_start_loc": starts,
            "non_spec_query_start_loc": rest_starts,
        }

    def _tokens(self, theirs: Tensor, others: Tensor, mask: Tensor) -> dict[str, Tensor]:
        fields = {"spec_token_indx": theirs, "non_spec_token_indx": others}
        return {**fields, "spec_token_masks": mask} if self.release.token_masks else fields

    def prefill(self, fields: dict[str, Any]) -> None:
        """Add what the release's own convolution and recurrence need of a batch with prefill."""
        if not fields["num_prefills"]:
            return
        common = self.common
        if self.release.finds_context:
            starts = common.query_start_loc
            context = common.seq_lens - (starts[1:] - starts[:-1])
        else:
            context = common.compute_num_computed_tokens()
        has_context = context > 0
        if self.rest is not None:
            has_context = has_context.index_select(0, self.rest)
        fields["has_initial_state"] = has_context
        counts, padded = gdn_vllm_conv.blocks_of(self.rest_starts)
        (sent,) = self._send(padded)
        fields.update(gdn_vllm_conv.fields(counts, padded, sent))

    def decode(self, fields: dict[str, Any]) -> None:
        """Empty the slots of requests that begin and are taken for decode."""
        if not fields["num_decodes"]:
            return
        rows = gdn_begin.rows(self.common, self.starts)
        if len(rows):
            (sent,) = self._send(rows)
            gdn_begin.empty(self.builder, self.table[:, 0].index_select(0, sent))

    def graphs(self, fields: dict[str, Any]) -> None:
        """Count tokens; put what a captured graph reads into the builder's own buffers."""
        builder, drafting = self.builder, fields["num_spec_decodes"]
        rows = drafting or fields["num_decodes"]
        captured = (
            builder.use_full_cuda_graph
            and not fields["num_prefills"]
            and not (drafting and fields["num_decodes"])
            and max(rows, fields["num_spec_decode_tokens"]) <= builder.decode_cudagraph_max_bs
        )
        tokens: int = self.common.num_actual_tokens
        if self.release.pads:
            tokens = (
                builder.vllm_config.pad_for_cudagraph(tokens)
                if captured
                else sum(fields[f"num_{kind}_tokens"] for kind in _KINDS)
            )
        fields["num_actual_tokens"] = tokens
        if not captured:
            return
        size = tokens
        if self.release.pads and drafting:
            size = min(builder.decode_cudagraph_max_bs, tokens)
        kind = "spec" if drafting else "non_spec"
        used = {f"{kind}_state_indices_tensor": (rows, size, self.module.PAD_SLOT_ID)}
        used[f"{kind}_query_start_loc"] = (rows + 1, size + 1, int(self.starts[rows]))
        if drafting:
            used["spec_sequence_masks"] = (rows, size, False)
            used["num_accepted_tokens"] = (rows, size, 1)
            lists = ("spec_token_indx", "non_spec_token_indx")
            for name in ("spec_token_masks",) if self.release.token_masks else lists:
                count = len(fields[name])
                used[name] = (count, tokens if self.release.token_masks else count, 0)
        for name, (first, end, rest) in used.items():
            buffer: Tensor = getattr(builder, name)
            buffer[:first].copy_(fields[name][:first], non_blocking=True)
            buffer[first:end].fill_(rest)
            fields[name] = buffer[:end]


def _counts(*numbers: int) -> dict[str, int]:
    names = [f"num_{kind}{what}" for kind in _KINDS for what in ("s", "_tokens")]
    return dict(zip(names, numbers, strict=True))


def _starts(lengths: Numbers) -> Numbers:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)

"""The chunked rule of vllm-ascend 0.11.0, which its layer calls for one sequence at a time.

The release's is plain torch: a row of each chunk after the other, and value heads that are always
twice the key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_patch.impl import gdn_ascend_served as served
from ascend_patch.kernels.gdn import (
    PinnedStaging,
    build_chunk_metadata,
    chunk,
    chunk_gated_delta_rule,
)

_staging: dict[torch.device, PinnedStaging] = {}


def torch_chunk_gated_delta_rule(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The function of that name, where a kernel takes the call."""
    del instance
    found = _on_a_kernel(*args, **kwargs)
    return wrapped(*args, **kwargs) if found is None else found


def _on_a_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """query, key [1, T, H, K], value [1, T, HV, V], g, beta [1, T, HV]; states [1, HV, K, V]."""
    if query.shape[0] != 1 or chunk_size != 64:
        return None
    device, tokens = query.device, query.shape[1]
    if device.type != "cpu" and device not in _staging:
        _staging[device] = PinnedStaging(device)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    chunks = build_chunk_metadata(starts, device, staging=_staging.get(device))
    mixed = torch.empty(
        tokens, 2 * key[0, 0].numel() + value[0, 0].numel(), dtype=query.dtype, device="meta"
    )
    state = torch.empty(
        (1, value.shape[2], key.shape[3], value.shape[3]), dtype=torch.float32, device="meta"
    )
    call = served.chunk_call(mixed, value[0], beta.dtype, chunks, state, "KV", None, None)
    if served.refusal(chunk.OPERATOR, device, call):
        return None
    return chunk_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        state_layout="KV",
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_metadata=chunks,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )

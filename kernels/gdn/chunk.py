"""chunk_gated_delta_rule: what it takes, and who runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.gdn import chunk_checks, reference
from ascend_patch.kernels.gdn.metadata import (
    ChunkMetadata,
    build_chunk_metadata,
    check_metadata,
)

OPERATOR = "chunk_gated_delta_rule"


@dataclass(frozen=True)
class Call:
    """A checked call: T tokens of N sequences.

    Attributes:
        q, k: [T, H, K].
        v, out: [T, HV, V].
        g, beta: [T, HV].
        metadata: The sequences; their chunks, on the device.
        initial: States to begin with, or None for zeros.
        final: Where final states go, or None; it may be ``initial`` itself.
        state_indices: int [N], a sequence's slot in both; without it its own number.
        has_initial_state: bool [N]; without it all that have a slot have one.
        state_layout: `KV` or `VK`, the last two dimensions of a state.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    scale: float
    out: Tensor
    metadata: ChunkMetadata
    initial: Tensor | None
    final: Tensor | None
    state_indices: Tensor | None
    has_initial_state: Tensor | None
    state_layout: str
    normalise: bool

    @property
    def starts(self) -> tuple[int, ...]:
        """query_start_loc on the host."""
        return self.metadata.starts

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[HV, K, V]."""
        return self.v.shape[1], self.k.shape[2], self.v.shape[2]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state_layout: str,
    scale: float | None = None,
    state: Tensor | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    chunk_metadata: ChunkMetadata | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Prefill of a gated delta rule layer over sequences of any lengths, in chunks.

    Args:
        q: [1, T, H, K], bfloat16, float16 or float32; any stride between tokens.
        k: The same.
        v: [1, T, HV, V], HV a multiple of H.
        g: [1, T, HV], the log decay, at most 0.
        beta: [1, T, HV], how much of a value is written.
        state_layout: `VK` or `KV`: the order of a state's last two dimensions. There is no default,
            because with K = V nothing else tells them apart.
        scale: Of q; K ** -0.5 if None.
        state: The cache, [slots, HV, V, K] or [slots, HV, K, V]: read and written in place.
        state_indices: int [N], each sequence's slot in ``state``; one below 0 has no state.
        has_initial_state: bool [N]; where false a sequence begins with zeros, whatever its slot
            holds. None: all begin with what their slot holds.
        initial_state: In place of a cache, [N, HV, V, K] or [N, HV, K, V].
        output_final_state: Return final states; a cache is written in any case.
        cu_seqlens: int [N + 1], where the sequences begin; None is one sequence of T tokens.
        chunk_metadata: What `build_chunk_metadata` made of it. Without, it is built here, which
            waits for the device.
        use_qk_l2norm_in_kernel: Divide q's and k's rows by their length first.
        out: [1, T, HV, V] for the result, contiguous in its last two dimensions.

    Returns:
        o [1, T, HV, V] in v's dtype, and the final states: float32 in ``initial_state``'s shape,
        or None with a cache or without ``output_final_state``.

    Raises:
        TypeError: A dtype outside the above.
        ValueError: Shapes, devices or memory that do not fit, an unknown layout, a cache and
            initial states together, a slot that the cache does not have (where ``state_indices``
            is on a CPU), a tensor that requires a gradient.
        NotImplementedError: No implementation takes this call; the message says what each asks for.

    Source: Gated Delta Networks, arXiv:2412.06464, section 3.3.
    """
    chunk_checks.check(
        q, k, v, g, beta, state_layout, state, state_indices, has_initial_state, initial_state, out
    )
    if scale is not None:
        scale = arguments.check_number("scale", scale)
    if chunk_metadata is None:
        chunk_metadata = _metadata(q, cu_seqlens)
    check_metadata(chunk_metadata, q.device)
    count = len(chunk_metadata.starts) - 1
    given = {
        "state_indices": state_indices,
        "has_initial_state": has_initial_state,
        "initial_state": initial_state,
    }
    chunk_checks.check_batch(q.shape[1], chunk_metadata.starts, given, state)
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = state
    if state is None and output_final_state:
        last = (k.shape[3], v.shape[3]) if state_layout == "KV" else (v.shape[3], k.shape[3])
        final = torch.empty(count, v.shape[2], *last, dtype=torch.float32, device=v.device)
    call = Call(
        q=q[0],
        k=k[0],
        v=v[0],
        g=g[0],
        beta=beta[0],
        scale=k.shape[3] ** -0.5 if scale is None else scale,
        out=out[0],
        metadata=chunk_metadata,
        initial=initial_state if state is None else state,
        final=final,
        state_indices=state_indices,
        has_initial_state=has_initial_state,
        state_layout=state_layout,
        normalise=use_qk_l2norm_in_kernel,
    )
    choice = dispatch.select(OPERATOR, q.device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{OPERATOR} on {q.device.type}: {choice.reason}")
    dispatch.observe(OPERATOR)
    choice.implementation.run(call)
    return out, final if state is None else None


def _metadata(q: Tensor, cu_seqlens: Tensor | None) -> ChunkMetadata:
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[1]], dtype=torch.int32)
    arguments.check_tensors(OPERATOR, {"cu_seqlens": cu_seqlens})
    return build_chunk_metadata(cu_seqlens.cpu(), q.device)


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", reference.run)
)

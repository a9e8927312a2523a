"""causal_conv1d and causal_conv1d_update: what they take, and who runs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.gdn import conv_checks, conv_reference
from ascend_patch.kernels.gdn.metadata import (
    ChunkMetadata,
    build_chunk_metadata,
    check_metadata,
)

OPERATOR = "causal_conv1d"
UPDATE = "causal_conv1d_update"


@dataclass(frozen=True)
class Call:
    """A checked call of `causal_conv1d`: T tokens of N sequences.

    Attributes:
        x, out: [T, C].
        weight: [C, W]; the last column is the token's own.
        bias: [C] or None.
        silu: Whether sums go through x sigmoid(x).
        conv_state: [slots, C, L] or None.
        state_indices: int [N], a sequence's slot; without it its own number.
        has_initial_state: bool [N]; without it all that have a slot have one.
        metadata: The sequences and their chunks, where the host knows them.
        starts: int [N + 1] on the device, where they begin.
        fill: Tokens of sequences without a slot become zero; else they are left as they are.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    conv_state: Tensor | None
    state_indices: Tensor | None
    has_initial_state: Tensor | None
    metadata: ChunkMetadata | None
    starts: Tensor
    out: Tensor
    fill: bool


@dataclass(frozen=True)
class UpdateCall:
    """A checked call of `causal_conv1d_update`: T tokens of N sequences.

    Attributes:
        x, out: [T, C].
        conv_state: [slots, C, L].
        weight, bias, silu, fill: As in `Call`.
        state_indices: int [N] or None.
        num_accepted_tokens: int [N] or None.
        starts: int [N + 1] on the device, or None for one token a sequence.
        sequences: N.
        max_query_len: No sequence has more tokens; below 1 where that is not known.
        pad_slot_id: One more slot, beside those below 0, that means none.
    """

    x: Tensor
    conv_state: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    state_indices: Tensor | None
    num_accepted_tokens: Tensor | None
    starts: Tensor | None
    sequences: int
    max_query_len: int
    pad_slot_id: int
    out: Tensor
    fill: bool


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | bool | None = None,
    conv_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    chunk_metadata: ChunkMetadata | None = None,
    query_start_loc: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve each channel of each sequence with its last W inputs: prefill.

    out[t] = act(bias + sum over j < W of weight[:, j] * x[t - W + 1 + j]), where what lies before
    a sequence is its state, or zero. Sums are float32 and are rounded once.

    Args:
        x: [T, C], bfloat16, float16 or float32; any stride between tokens.
        weight: [C, W], 2 <= W <= 5; any floating dtype of the three, any strides.
        bias: [C] or None.
        activation: "silu", "swish" or True for x sigmoid(x); None or False for none.
        conv_state: The cache, [slots, C, L] with L >= W - 1 and any strides. Its first W - 1 places
            hold the inputs before a sequence, oldest first: read, and then written in place with
            its last ones. A sequence without tokens leaves them as they are.
        state_indices: int [N], each sequence's slot in it; None is its own number. One below 0 is
            padding: nothing of such a sequence is computed, no state is read or written.
        has_initial_state: bool [N]; where false a sequence begins with zeros, whatever its slot
            holds. None: all begin with what their slot holds.
        chunk_metadata: What `build_chunk_metadata` made of query_start_loc; with it no device
            memory is read.
        query_start_loc: int32 or int64 [N + 1], where the sequences begin, in its place; with
            neither there is one sequence of T tokens.
        out: [T, C] for the result, elsewhere than x. Tokens of padding and behind the last sequence
            stay as they are in it; in one that is made here they are zero.

    Returns:
        out, [T, C] in x's dtype.

    Raises:
        TypeError: A dtype outside the above.
        ValueError: Shapes, devices or memory that do not fit, an unknown activation, an ``out``
            that is x, a tensor that requires a gradient; where they are on a CPU, sequences that
            do not lie in the tokens and slots that the cache does not have.
        NotImplementedError: No implementation takes this call; the message says what each asks for.

    Source: the semantics of vLLM's causal_conv1d_fn (model_executor/layers/mamba/ops).
    """
    arguments.check_tensors(
        OPERATOR,
        {"x": x, "weight": weight},
        {
            "bias": bias,
            "conv_state": conv_state,
            "state_indices": state_indices,
            "has_initial_state": has_initial_state,
            "query_start_loc": query_start_loc,
            "out": out,
        },
    )
    silu = conv_checks.check(x, weight, bias, activation, conv_state, out)
    conv_checks.check_states(conv_state, state_indices, has_initial_state)
    if out is not None and out.data_ptr() == x.data_ptr() and x.numel():
        raise ValueError("out is x: a token's neighbours are read after it was written")
    if out is not None:
        arguments.check_apart("out", out, {"x": x})
    if chunk_metadata is not None:
        check_metadata(chunk_metadata, x.device)
    if chunk_metadata is None and query_start_loc is None:
        whole = torch.tensor([0, x.shape[0]], dtype=torch.int32)
        chunk_metadata = build_chunk_metadata(whole, x.device)
    starts = query_start_loc if chunk_metadata is None else chunk_metadata.cu_seqlens
    assert starts is not None
    given = {"state_indices": state_indices, "has_initial_state": has_initial_state}
    known = None if chunk_metadata is None else chunk_metadata.starts
    conv_checks.check_batch(x.shape[0], starts, known, given, conv_state)
    fill = out is None
    if out is None:
        out = _output(x, None if chunk_metadata is None else chunk_metadata.starts[-1])
    call = Call(
        x=x,
        weight=weight,
        bias=bias,
        silu=silu,
        conv_state=conv_state,
        state_indices=state_indices,
        has_initial_state=has_initial_state,
        metadata=chunk_metadata,
        starts=starts,
        out=out,
        fill=fill,
    )
    _run(OPERATOR, x, call)
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | bool | None = None,
    state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    max_query_len: int = -1,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of a few tokens a sequence, all of which have a state: decode.

    With ``num_accepted_tokens`` (speculative decoding) the state is a longer window: of what the
    step before wrote, a sequence begins at place num_accepted_tokens - 1, which drops the tokens
    that were refused; afterwards the window is moved by one and the step's tokens follow, W - 2 +
    tokens places in all. Without, the first W - 1 places are the last inputs, as after a prefill.

    Args:
        x: [B, C], a token of each of B sequences; with ``query_start_loc`` [T, C].
        conv_state: The cache, as in `causal_conv1d`; speculative steps of s tokens need L >=
            W - 2 + s. What does not fit is not written.
        weight, bias, activation: As in `causal_conv1d`.
        state_indices: int [N], any stride; as in `causal_conv1d`.
        num_accepted_tokens: int [N], from 1 on, or None.
        query_start_loc: int32 or int64 [N + 1] or longer: several tokens a sequence, or none, which
            leaves its state as it is. N is the length of ``state_indices``, which is then needed.
        max_query_len: No sequence has more tokens. Below 1: not known; a device may be read for it.
        pad_slot_id: A slot that means padding; those below 0 do in any case.
        out: As in `causal_conv1d`; here it may be x.

    Returns:
        out, in x's shape and dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: As `causal_conv1d`.

    Source: the semantics of vLLM's causal_conv1d_update. Where it is given queries of unequal
    lengths and no num_accepted_tokens, it keeps fewer places for the shorter ones; here they too
    keep their last W - 1 inputs.
    """
    arguments.check_tensors(
        UPDATE,
        {"x": x, "conv_state": conv_state, "weight": weight},
        {
            "bias": bias,
            "state_indices": state_indices,
            "num_accepted_tokens": num_accepted_tokens,
            "query_start_loc": query_start_loc,
            "out": out,
        },
    )
    silu = conv_checks.check(x, weight, bias, activation, conv_state, out)
    conv_checks.check_states(conv_state, state_indices, None)
    if out is not None:
        arguments.check_apart("out", out, {"x": x}, itself=True)
    if query_start_loc is not None and state_indices is None:
        raise ValueError(
            "query_start_loc needs state_indices: their length says how many there are"
        )
    sequences = x.shape[0]
    if query_start_loc is not None and state_indices is not None:
        sequences = state_indices.shape[0]
    given = {"state_indices": state_indices, "num_accepted_tokens": num_accepted_tokens}
    conv_checks.check_update(sequences, conv_state, query_start_loc, given, x.shape[0], pad_slot_id)
    fill = out is None
    if out is None:
        out = _output(x, sequences if query_start_loc is None else None)
    call = UpdateCall(
        x=x,
        conv_state=conv_state,
        weight=weight,
        bias=bias,
        silu=silu,
        state_indices=state_indices,
        num_accepted_tokens=num_accepted_tokens,
        starts=query_start_loc,
        sequences=sequences,
        max_query_len=max_query_len,
        pad_slot_id=pad_slot_id,
        out=out,
        fill=fill,
    )
    _run(UPDATE, x, call)
    return out


def _output(x: Tensor, written: int | None) -> Tensor:
    """A tensor like x, zero where no sequence writes; ``written`` tokens, or None: not known."""
    shape = (x.shape[0], x.shape[1])
    if written is None:
        return torch.zeros(shape, dtype=x.dtype, device=x.device)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if written < x.shape[0]:
        out[written:].zero_()
    return out


def _run(operator: str, x: Tensor, call: Call | UpdateCall) -> None:
    choice = dispatch.select(operator, x.device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{operator} on {x.device.type}: {choice.reason}")
    dispatch.observe(operator)
    choice.implementation.run(call)


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", conv_reference.run)
)
dispatch.register(
    UPDATE, dispatch.ANY_DEVICE, dispatch.Implementation("reference", conv_reference.run_update)
)

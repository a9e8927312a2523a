"""recurrent_gated_delta_rule in torch: float32 arithmetic, all requests at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ascend_patch.kernels.gdn.gating_reference import gate
from ascend_patch.kernels.gdn.reference import NORM_EPS

if TYPE_CHECKING:
    from ascend_patch.kernels.gdn.recurrent import RecurrentCall


def run(call: RecurrentCall) -> None:
    """Any call that `recurrent.recurrent_gated_delta_rule` accepts.

    The loop is over positions within a request, not over requests. Reads slots and lengths.
    """
    if not call.requests:
        return
    starts, lengths = _tokens(call)
    columns = call.state_indices[: call.requests].long()
    columns = columns if columns.dim() == 2 else columns[:, None]
    first = torch.zeros_like(starts)
    if call.num_accepted_tokens is not None:
        accepted = call.num_accepted_tokens[: call.requests].long()
        first = (accepted - 1).clamp(0, columns.shape[1] - 1)
    slots = columns.gather(1, first[:, None])[:, 0]
    kept = slots >= 0
    if not kept.all():
        _clear_padding(call.out, starts, lengths, ~kept)
        starts, lengths, columns, slots = (x[kept] for x in (starts, lengths, columns, slots))
    most = int(lengths.max()) if len(lengths) else 0
    if not most:
        return
    # A copy, also where the cache is float32 itself: indexing makes one.
    states = call.state[slots].float()
    for position in range(most):
        live = (lengths > position).nonzero()[:, 0]
        every = len(live) == len(lengths)
        held = states if every else states[live]
        tokens = starts[live] + position
        call.out[tokens] = _step(call, held, tokens).to(call.out.dtype)
        if not every:
            states[live] = held
        if call.state_indices.dim() == 1:
            ends = lengths[live] == position + 1
            _keep(call.state, slots[live][ends], held if ends.all() else held[ends])
        elif position < columns.shape[1]:
            into = columns[live, position]
            there = into >= 0
            _keep(call.state, into[there], held if there.all() else held[there])


def _tokens(call: RecurrentCall) -> tuple[Tensor, Tensor]:
    """Each request's first token and their number, int64 [N]."""
    if call.cu_seqlens is None:
        starts = torch.arange(call.requests, device=call.q.device)
        return starts, torch.ones_like(starts)
    places = call.cu_seqlens.long()
    return places[:-1], places.diff()


def _clear_padding(out: Tensor, starts: Tensor, lengths: Tensor, padding: Tensor) -> None:
    tokens = torch.repeat_interleave(padding, lengths).nonzero()[:, 0] + starts[0]
    out[tokens] = 0


def _keep(state: Tensor, slots: Tensor, found: Tensor) -> None:
    state[slots] = found.to(state.dtype)


def _step(call: RecurrentCall, state: Tensor, tokens: Tensor) -> Tensor:
    """One token each: float32 [M, HV, V]; ``state``, float32, becomes what is behind the token."""
    group = call.v.shape[1] // call.k.shape[1]
    q, k = (_rows(x[tokens], group, call.normalise) for x in (call.q, call.k))
    g, beta = (x[tokens].float() for x in (call.g, call.beta))
    if call.A_log is not None and call.dt_bias is not None:
        g, beta = gate(g, beta, call.A_log, call.dt_bias)
    wide = state if call.state_layout == "VK" else state.transpose(-1, -2)
    state.mul_(g.exp()[..., None, None])
    known = (wide @ k[..., None])[..., 0]
    change = (call.v[tokens].float() - known) * beta[..., None]
    wide.addcmul_(change[..., None], k[..., None, :])
    return (wide @ q[..., None])[..., 0] * call.scale


def _rows(x: Tensor, group: int, normalise: bool) -> Tensor:
    """[M, H, K] -> [M, HV, K] in float32."""
    x = x.float()
    if normalise:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
    return x.repeat_interleave(group, dim=1)

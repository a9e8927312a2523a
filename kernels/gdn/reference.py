"""The gated delta rule in torch: float32 arithmetic, chunk by chunk, for a CPU and as an oracle.

With S [K, V] a value head's state, for each token: S = exp(g) S; S += k (beta (v - S^T k))^T;
o = scale S^T q. Source: Gated Delta Networks, arXiv:2412.06464, eq. 10 and section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ascend_patch.kernels.gdn.chunk import Call

CHUNK = 64
NORM_EPS = 1e-6


def run(call: Call) -> None:
    """Any call that `chunk.chunk_gated_delta_rule` accepts."""
    indices = call.state_indices.tolist() if call.state_indices is not None else None
    carried = call.has_initial_state.tolist() if call.has_initial_state is not None else None
    group = call.v.shape[1] // call.k.shape[1]
    for sequence, (start, end) in enumerate(zip(call.starts, call.starts[1:], strict=False)):
        slot = sequence if indices is None else indices[sequence]
        state = torch.zeros(call.state_shape, dtype=torch.float32, device=call.q.device)
        if call.initial is not None and slot >= 0 and (carried is None or carried[sequence]):
            state = _as_kv(call.initial[slot], call.state_layout).float()
        tokens = slice(start, end)
        if start < end:
            q, k = (_rows(x[tokens], group, call.normalise) for x in (call.q, call.k))
            v, g, beta = (x[tokens].float().transpose(0, 1) for x in (call.v, call.g, call.beta))
            out, state = chunked(q * call.scale, k, v, g, beta, state)
            call.out[tokens] = out.transpose(0, 1).to(call.out.dtype)
        if call.final is not None and slot >= 0:
            _as_kv(call.final[slot], call.state_layout).copy_(state)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence, float32: q, k [HV, T, K]; v [HV, T, V]; g, beta [HV, T]; state [HV, K, V].

    Returns:
        o [HV, T, V] and the state behind the last token.
    """
    heads, tokens, _ = q.shape
    size = min(CHUNK, tokens)
    count = -(-tokens // size)

    def chunks(x: Tensor) -> Tensor:
        # Padding has beta 0 and g 0: it writes nothing and nothing decays.
        padded = x.new_zeros(heads, count * size, *x.shape[2:])
        padded[:, :tokens] = x
        return padded.unflatten(1, (count, size))

    q, k, v, g, beta = (chunks(x) for x in (q, k, v, g, beta))
    total = g.cumsum(-1)
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Above the diagonal the exponent is positive and without bound.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, 0.0).exp()
    decay = decay * lower
    scores = (k @ k.transpose(-1, -2)) * decay * beta[..., None]
    system = scores.tril(-1) + torch.eye(size, device=q.device)
    both = torch.cat((v * beta[..., None], k * (beta * total.exp())[..., None]), -1)
    u, w = torch.linalg.solve_triangular(system, both, upper=False).split(
        (v.shape[-1], k.shape[-1]), -1
    )
    scores = (q @ k.transpose(-1, -2)) * decay
    q = q * total.exp()[..., None]
    k = k * (total[..., -1:] - total).exp()[..., None]
    last = total[..., -1].exp()[..., None, None]
    out = torch.empty_like(v)
    for n in range(count):
        written = u[:, n] - w[:, n] @ state
        out[:, n] = q[:, n] @ state + scores[:, n] @ written
        state = last[:, n] * state + k[:, n].transpose(-1, -2) @ written
    return out.flatten(1, 2)[:, :tokens], state


def _rows(x: Tensor, group: int, normalise: bool) -> Tensor:
    """[T, H, K] -> [HV, T, K] in float32."""
    x = x.float()
    if normalise:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
    return x.repeat_interleave(group, dim=1).transpose(0, 1)


def _as_kv(state: Tensor, layout: str) -> Tensor:
    return state if layout == "KV" else state.transpose(-1, -2)

"""What chunk_gated_delta_rule must return: the recurrence, token by token, in float64 on the CPU.

Written apart from the kernels and from their reference: nothing is chunked here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NORM_EPS = 1e-6


def recurrence(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a call of chunk_gated_delta_rule, its cache left as it is.

    Args:
        arguments: Those of the call, by name; chunk_metadata must be among them.

    Returns:
        o [T', HV, V] of the T' tokens that belong to sequences; the final states [N, HV, K, V]; and
        bool [N], whether a sequence's state is kept anywhere. All float64 on the CPU.

    Source: Gated Delta Networks, arXiv:2412.06464, eq. 10.
    """
    starts = arguments["chunk_metadata"].starts
    layout, normalise = arguments["state_layout"], arguments.get("use_qk_l2norm_in_kernel", False)
    q, k, v, g, beta = (_exact(arguments[name][0]) for name in ("q", "k", "v", "g", "beta"))
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + _NORM_EPS).sqrt() for x in (q, k))
    group = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    q = q * (arguments.get("scale") or k.shape[2] ** -0.5)
    state, kept = _first_states(arguments, len(starts) - 1, (v.shape[1], k.shape[2], v.shape[2]))
    if layout not in ("VK", "KV"):
        raise ValueError(f"state_layout must be 'VK' or 'KV', not {layout!r}")
    out = torch.zeros(starts[-1], *v.shape[1:], dtype=torch.float64)
    lengths = torch.tensor(starts).diff()
    begins = torch.tensor(starts[:-1])
    for step in range(int(lengths.max()) if len(lengths) else 0):
        # The sequences that have a token here, all at once.
        alive = (lengths > step).nonzero()[:, 0]
        at = begins[alive] + step
        now = state[alive] * g[at].exp()[..., None, None]
        change = beta[at][..., None] * (v[at] - _read(now, k[at]))
        now = now + k[at][..., None] * change[..., None, :]
        state[alive] = now
        out[at] = _read(now, q[at])
    return out, state, kept


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _read(state: Tensor, x: Tensor) -> Tensor:
    """state^T x of each head."""
    return (x[..., None, :] @ state)[..., 0, :]


def _first_states(
    arguments: dict[str, Any], count: int, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """States [N, HV, K, V] to begin with, and whether each one's last is kept."""
    found = torch.zeros(count, *shape, dtype=torch.float64)
    kept = torch.ones(count, dtype=torch.bool)
    given, slots = arguments.get("initial_state"), arguments.get("state_indices")
    carried = kept.clone()
    if slots is not None:
        given = arguments["state"]
        kept = slots.cpu()[:count] >= 0
        flags = arguments.get("has_initial_state")
        carried = kept if flags is None else kept & flags.cpu()[:count].bool()
    if given is not None:
        at = torch.arange(count) if slots is None else slots.cpu()[:count].long()
        held = _exact(given)[at[carried]]
        found[carried] = held if arguments["state_layout"] == "KV" else held.transpose(-1, -2)
    return found, kept

"""What scripts/bench gdn measures prefill against, and what every result is held to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

STEPS = 64


def recurrence(arguments: dict[str, Any], starts: tuple[int, ...]) -> tuple[Any, Any]:
    """The rule token by token in fp64 on the arguments' device: o [T, HV, V], states [N, HV, V, K].

    Sequences go through it together, `STEPS` tokens a captured graph; arXiv:2412.06464, eq. 10.
    """
    import torch

    q, k, v, g, beta = (arguments[name][0] for name in ("q", "k", "v", "g", "beta"))
    tokens, heads, width = v.shape
    group, device = heads // k.shape[1], v.device
    begin = torch.tensor(starts[:-1], device=device)
    length = torch.tensor(starts[1:], device=device) - begin
    state = arguments["initial_state"].double().clone()
    out = torch.empty(tokens + 1, heads, width, dtype=torch.float64, device=device)
    step = torch.zeros((), dtype=torch.long, device=device)

    def rows(x: Any, at: Any) -> Any:
        x = x[at].double()
        x = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        return x.repeat_interleave(group, 1)

    def one() -> None:
        live = step < length
        at = torch.where(live, begin + step, 0)
        key = rows(k, at)
        decayed = state * g[at].double().exp()[..., None, None]
        change = v[at].double() - torch.einsum("nhvk,nhk->nhv", decayed, key)
        change = change * beta[at].double()[..., None]
        moved = decayed + change[..., None] * key[..., None, :]
        state.copy_(torch.where(live[:, None, None, None], moved, state))
        found = torch.einsum("nhvk,nhk->nhv", moved, rows(q, at)) * k.shape[2] ** -0.5
        # Sequences that have ended write to a row of their own.
        out.index_copy_(0, torch.where(live, at, tokens), found)
        step.add_(1)

    stream, before = torch.cuda.Stream(), state.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        one()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(STEPS):
                one()
        state.copy_(before)
        step.zero_()
        for _ in range(-(-int(length.max()) // STEPS)):
            graph.replay()
        stream.synchronize()
    return out[:tokens], state


def apart(found: Any, wanted: Any) -> float:
    """Root mean square of the error over that of what is wanted; infinite where it is no number."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return error if error == error else float("inf")


def vllm(site: str) -> Callable[..., Any] | None:
    """vLLM 0.18.0's chunk_gated_delta_rule on Triton, or None with a line that says why not."""
    try:
        if site:
            sys.path.append(site)
        from vllm.model_executor.layers.fla.ops import chunk_gated_delta_rule
    except Exception as error:
        print(f"vLLM is not measured: {type(error).__name__}: {error}")
        return None
    return chunk_gated_delta_rule


def fla(site: str) -> Callable[..., Any] | None:
    """fla-core's, on Triton, or None with a line that says why not."""
    os.environ.setdefault("FLA_BACKEND", "triton")
    try:
        if site:
            sys.path.append(site)
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as error:
        print(f"fla-core is not measured: {type(error).__name__}: {error}")
        return None
    return chunk_gated_delta_rule

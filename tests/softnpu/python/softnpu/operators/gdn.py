"""Gated delta networks: the causal convolution of a prefill, and the recurrent rule of a decode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require


def npu_causal_conv1d_custom(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    bias_opt: Tensor | None,
    query_start_loc_opt: Sequence[int],
    cache_indices_opt: Sequence[int],
    initial_state_mode_opt: Sequence[int],
    num_accepted_tokens_opt: Sequence[int],
    activation_mode: int,
    pad_slot_id: int,
    run_mode: int,
) -> Tensor:
    """A convolution along each sequence of a prefill; [T, C], and SiLU where the mode is 1.

    Args:
        x: [T, C], sequences one behind the other.
        weight: [W, C]; the last row is of the token itself.
        conv_state: [slots, at least W - 1, C], the last inputs; written.
        query_start_loc_opt: Of each sequence its first row, and the last one's end.
        cache_indices_opt: Of each sequence its slot; `pad_slot_id` leaves a sequence out.
        initial_state_mode_opt: Whether the slot's inputs come before; zeros otherwise.
    """
    name, width = "npu_causal_conv1d_custom", weight.shape[0]
    require(run_mode == 0, name, f"run_mode is {run_mode}; only 0, a prefill, is implemented")
    require(not num_accepted_tokens_opt, name, "accepted tokens are implemented by none here")
    sizes = (len(query_start_loc_opt) - 1, len(cache_indices_opt), len(initial_state_mode_opt))
    require(len(set(sizes)) == 1, name, f"{sizes} sequences by starts, slots and modes")
    end = query_start_loc_opt[-1]
    require(end <= x.shape[0], name, f"x has {x.shape[0]} rows and the sequences {end}")
    out = torch.zeros_like(x)
    if x.is_meta:
        return out
    taps = weight.float()
    sequences = zip(
        itertools.pairwise(query_start_loc_opt), cache_indices_opt, initial_state_mode_opt,
        strict=True,
    )  # fmt: skip
    for (start, end), slot, carried in sequences:
        if slot == pad_slot_id or start == end:
            continue
        before = conv_state[slot, : width - 1].float()
        rows = torch.cat((before if carried else torch.zeros_like(before), x[start:end].float()))
        total = sum(rows[j : j + end - start] * taps[j] for j in range(width))
        if bias_opt is not None:
            total = total + bias_opt.float()
        out[start:end] = (total * torch.sigmoid(total) if activation_mode else total).to(x.dtype)
        conv_state[slot, : width - 1] = rows[1 - width :].to(conv_state.dtype)
    return out


def npu_recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    beta: Tensor | None = None,
    scale: float | None = None,
    actual_seq_lengths: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    g: Tensor | None = None,
    gk: Tensor | None = None,
) -> Tensor:
    """[T, HV, V] of some tokens a sequence, each of which keeps its state in a slot of its own.

    A token's state is S = exp(g) S + beta (v - exp(g) S k) k^T, its output S q times scale.

    Args:
        query, key: [T, HK, K], HV a multiple of HK; value [T, HV, V].
        state: [slots, HV, V, K]; written.
        beta, g: [T, HV].
        actual_seq_lengths: [B], tokens of each sequence, T together.
        ssm_state_indices: [T], the slot of each token; a sequence begins with that of its first.
        num_accepted_tokens: [B]; a sequence begins with the slot of the last accepted one.
    """
    name = "npu_recurrent_gated_delta_rule"
    require(query.dtype == torch.bfloat16, name, f"query is {query.dtype}, not torch.bfloat16")
    require(gk is None, name, "gk is not implemented")
    given = {"beta": beta, "scale": scale, "actual_seq_lengths": actual_seq_lengths, "g": g,
             "ssm_state_indices": ssm_state_indices}  # fmt: skip
    absent = [key for key, one in given.items() if one is None]
    require(not absent, name, f"without {', '.join(absent)} it is not implemented")
    heads, groups = value.shape[1], key.shape[1]
    require(heads % groups == 0, name, f"{heads} heads of values, {groups} of keys")
    right = (heads, value.shape[2], key.shape[2])
    require(state.shape[1:] == right, name, f"state is {list(state.shape)}, not [slots, {right}]")
    out = torch.zeros_like(value)
    if value.is_meta:
        return out
    lengths, slots = actual_seq_lengths.tolist(), ssm_state_indices.tolist()
    require(sum(lengths) <= len(slots), name, f"{sum(lengths)} tokens and {len(slots)} slots")
    q, k = (x.float().repeat_interleave(heads // groups, 1) for x in (query, key))
    v, at = value.float(), 0
    for n, length in enumerate(lengths):
        first = at if num_accepted_tokens is None else at + int(num_accepted_tokens[n]) - 1
        held = state[slots[first]].float()
        for t in range(at, at + length):
            held = held * g[t].float().exp()[:, None, None]
            change = beta[t].float()[:, None] * (v[t] - (held * k[t][:, None]).sum(-1))
            held = held + change[:, :, None] * k[t][:, None]
            out[t] = ((held * q[t][:, None]).sum(-1) * scale).to(out.dtype)
            state[slots[t]] = held.to(state.dtype)
        at += length
    return out


KERNELS: dict[str, Callable[..., Any]] = {
    "npu::npu_recurrent_gated_delta_rule": npu_recurrent_gated_delta_rule,
    "_C_ascend::npu_causal_conv1d_custom": npu_causal_conv1d_custom,
}

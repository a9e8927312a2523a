"""recurrent_gated_delta_rule: a decode step, plain or speculative, on the cache itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_patch.kernels import arguments, dispatch
from ascend_patch.kernels.gdn import recurrent_checks, recurrent_reference

OPERATOR = "recurrent_gated_delta_rule"


@dataclass(frozen=True)
class RecurrentCall:
    """A checked call: T tokens of N requests.

    Attributes:
        q, k: [T, H, K].
        v, out: [T, HV, V].
        g, beta: [T, HV]; where ``raw``, what the gates are computed from: a and b.
        A_log, dt_bias: [HV] where ``raw``, else None.
        state: [slots, HV, V, K] or [slots, HV, K, V].
        state_indices: int [N] or [N, S], or with more rows.
        cu_seqlens: int [N + 1], or None: one token each.
        num_accepted_tokens: int [N], or with more entries, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    state: Tensor
    state_layout: str
    state_indices: Tensor
    cu_seqlens: Tensor | None
    num_accepted_tokens: Tensor | None
    requests: int
    scale: float
    normalise: bool
    out: Tensor

    @property
    def raw(self) -> bool:
        """Whether the gates are yet to be computed."""
        return self.A_log is not None


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: Tensor,
    state_layout: str,
    state_indices: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """A step of a gated delta rule layer, token by token: states are read and written in place.

    With S [K, V] the state of a value head, for each token: S = exp(g) S;
    S += k (beta (v - S^T k))^T; o = scale S^T q. Arithmetic and the state between the tokens of a
    request are float32; results are rounded once.

    Args:
        q: [1, T, H, K], bfloat16, float16 or float32; any stride between tokens, so slices of one
            mixed qkv row serve.
        k: The same.
        v: [1, T, HV, V], HV a multiple of H.
        state: The cache, [slots, HV, V, K] or [slots, HV, K, V], bfloat16, float16 or float32;
            any stride between slots.
        state_layout: `VK` or `KV`: the order of a state's last two dimensions. There is no default,
            because with K = V nothing else tells them apart.
        state_indices: int [N], each request's slot: it begins with what the slot holds and leaves
            its last state there. Or int [N, S], speculative: it begins with the state in column
            ``num_accepted_tokens[n] - 1`` (column 0 without), and its j-th token's state goes to
            column j. A request that would begin in a slot below 0 is padding: its outputs are
            zeros, no state is touched. A column with a slot below 0, or past S, is not written.
            There may be more rows than requests.
        g: [1, T, HV], the log decay; with ``beta`` [1, T, HV], how much of a value is written.
        beta: See g.
        a: [T, HV], any stride between tokens; with b [T, HV], A_log [HV] and dt_bias [HV] in place
            of g and beta: these are then computed on the way, as `fused_gating` does.
        b: See a.
        A_log: See a.
        dt_bias: See a.
        cu_seqlens: int [N + 1], where requests begin; None: T requests of one token. The host does
            not read it. Tokens behind the last request are left alone.
        num_accepted_tokens: int [N], from 1 to S; only with [N, S].
        scale: Of q; K ** -0.5 if None.
        use_qk_l2norm_in_kernel: Divide q's and k's rows by their length (eps 1e-6) first.
        out: [1, T, HV, V] in v's dtype for the result.

    Returns:
        o, [1, T, HV, V] in v's dtype; ``out`` if that was given.

    Raises:
        TypeError: A dtype outside the above.
        ValueError: Shapes, devices or memory that do not fit, an unknown layout, gates given twice
            or not at all, a tensor that requires a gradient; where they are on a CPU, requests
            that do not lie in the tokens and slots that the cache does not have.
        NotImplementedError: No implementation takes this call; the message says what each asks for.

    Stands for vLLM's `fused_recurrent_gated_delta_rule` (g and beta; the only one to 0.17),
    `fused_sigmoid_gating_delta_rule_update` (a, b, A_log, dt_bias; from 0.18.0) and
    `fused_recurrent_gated_delta_rule_packed_decode` (the same, one token each; from 0.18.0), which
    differ among themselves and between releases:

    - The cache is KV up to 0.15.1, VK from 0.16.0 on.
    - Padding: a slot below 0 is skipped from 0.16.0 to 0.19.1; before, nothing is skipped and a
      padded request must have no tokens (its query_start_loc says so); from 0.20.0 slot 0, the null
      block, is skipped too. Here it is a slot like any other, which nobody reads.
    - A skipped request's outputs are zeros in packed_decode and left as they were in the others.
    - beta is rounded to b's dtype in packed_decode and by `fused_gdn_gating`, and is float32 in
      fused_sigmoid_gating. Here it is float32, but for a beta that is given.
    - With state_indices [N], theirs take the slots that follow in memory for further tokens of a
      request, which no caller has.

    Source: Gated Delta Networks, arXiv:2412.06464, eq. 10.
    """
    arguments.check_tensors(
        OPERATOR,
        {"q": q, "k": k, "v": v, "state": state, "state_indices": state_indices},
        {
            "g": g,
            "beta": beta,
            "a": a,
            "b": b,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "cu_seqlens": cu_seqlens,
            "num_accepted_tokens": num_accepted_tokens,
            "out": out,
        },
    )
    if scale is not None:
        scale = arguments.check_number("scale", scale)
    recurrent_checks.check(q, k, v, state, state_layout, out)
    if out is not None:
        read = {"state": state, "g": g, "beta": beta, "a": a, "b": b}
        arguments.check_apart("out", out, {**read, "A_log": A_log, "dt_bias": dt_bias})
    decay, weight = recurrent_checks.check_gates(v, (g, beta), (a, b, A_log, dt_bias))
    requests = recurrent_checks.check_requests(
        q.shape[1], state_indices, cu_seqlens, num_accepted_tokens, state.shape[0]
    )
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    call = RecurrentCall(
        q=q[0],
        k=k[0],
        v=v[0],
        g=decay,
        beta=weight,
        A_log=A_log,
        dt_bias=dt_bias,
        state=state,
        state_layout=state_layout,
        state_indices=state_indices,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens,
        requests=requests,
        scale=k.shape[3] ** -0.5 if scale is None else scale,
        normalise=use_qk_l2norm_in_kernel,
        out=out[0],
    )
    choice = dispatch.select(OPERATOR, q.device.type, call)
    if choice.implementation is None:
        raise NotImplementedError(f"{OPERATOR} on {q.device.type}: {choice.reason}")
    dispatch.observe(OPERATOR)
    choice.implementation.run(call)
    return out


dispatch.register(
    OPERATOR, dispatch.ANY_DEVICE, dispatch.Implementation("reference", recurrent_reference.run)
)

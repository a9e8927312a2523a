"""The chunked rule of vllm-ascend 0.23.0 on CPU tensors: its Triton kernels, and AscendC's two.

AscendC's find a chunk's tokens by its pair in chunk_indices, looked up in cu_seqlens, both lists of
the host (csrc/moe/chunk_fwd_o, csrc/moe/chunk_gated_delta_rule_fwd_h of v0.23.0).

Import it in an environment's process, after vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from types import SimpleNamespace

import ascend_fla
import torch
import triton.runtime.interpreter as interpreter
from ascend_fla import CHUNK, PACKAGE
from device_reads import as_kernel

KERNELS = ("cumsum.chunk_local_cumsum_scalar_kernel", "wy_fast.recompute_w_u_fwd_kernel",
           "solve_tril.merge_16x16_to_64x64_inverse_kernel")  # fmt: skip


def fwd_h(k, w, u, *, g, gk, initial_state, cu_seqlens, chunk_indices, **_):
    """h [1, H, chunks, K, V] before each chunk, v_new [1, H, T, V], and last states [N, H, K, V].

    k [1, Hk, T, K], w [1, H, T, K], u [1, H, T, V], g [1, H, T].
    """
    assert gk is None
    heads, (count, pairs) = u.shape[1], _pairs(cu_seqlens, chunk_indices)
    keys = k.float().repeat_interleave(heads // k.shape[1], 1)
    h = torch.zeros(1, heads, len(pairs), k.shape[3], u.shape[3])
    v_new, states = torch.zeros_like(u), initial_state.float().clone()
    assert len(states) == count, "a state for each sequence"
    for c, (sequence, first, end) in enumerate(pairs):
        part, state = slice(first, end), states[sequence]
        h[0, :, c] = state
        new = u[0, :, part].float() - w[0, :, part].float() @ state
        v_new[0, :, part] = new.to(v_new.dtype)
        total = g[0, :, part].float()
        last = total[:, -1:]
        left = new * (last - total).exp()[..., None]
        states[sequence] = state * last.exp()[..., None] + keys[0, :, part].mT @ left
    return h.to(k.dtype), v_new, states


def fwd_o(q, k, v_new, h, scale, *, g, g_gamma, cu_seqlens, chunk_indices, **_):
    """[1, H, T, V]."""
    assert g_gamma is None
    heads, (_, pairs) = v_new.shape[1], _pairs(cu_seqlens, chunk_indices)
    q, k = (x.float().repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    out = torch.full_like(v_new, torch.nan)
    for c, (_, first, end) in enumerate(pairs):
        part = slice(first, end)
        total = g[0, :, part].float()
        decay = (total[:, :, None] - total[:, None]).clamp_max(0).exp()
        scores = (q[0, :, part] @ k[0, :, part].mT * decay).tril()
        found = q[0, :, part] @ h[0, :, c].float() * total.exp()[..., None]
        out[0, :, part] = ((found + scores @ v_new[0, :, part].float()) * scale).to(out.dtype)
    return out


def _pairs(starts, indices) -> tuple[int, list[tuple[int, int, int]]]:
    """How many sequences there are, and (sequence, first token, end) of each chunk."""
    pairs = list(zip(indices[::2], indices[1::2], strict=True))
    assert len(pairs) == sum(-(-(b - a) // CHUNK) for a, b in itertools.pairwise(starts))
    return len(starts) - 1, [
        (n, starts[n] + c * CHUNK, min(starts[n] + c * CHUNK + CHUNK, starts[n + 1]))
        for n, c in pairs
    ]


def install() -> None:
    for name in KERNELS:
        module, _, kernel = name.partition(".")
        module = importlib.import_module(f"{PACKAGE}.{module}")
        setattr(module, kernel, ascend_fla.Kernel(ascend_fla.KERNELS[name]))
    operator = importlib.import_module("vllm_ascend.device.device_op").DeviceOperator

    def kkt(**given):
        ascend_fla.scaled_dot_kkt(None, **given)
        return given["A"]

    def solve(**given):
        ascend_fla.solve_16(None, **given)

    for name, run in (("solve_tril_16x16", solve), ("chunk_scaled_dot_kkt_fwd", kkt)):
        setattr(operator, name, staticmethod(as_kernel(run)))
    torch.ops._C_ascend.chunk_gated_delta_rule_fwd_h = as_kernel(fwd_h)
    torch.ops._C_ascend.chunk_fwd_o = as_kernel(fwd_o)
    # What runs in the interpreter.
    executor = interpreter.GridExecutor
    executor.__call__ = as_kernel(executor.__call__)
    torch.npu.device = lambda *_: contextlib.nullcontext()
    properties = importlib.import_module("vllm_ascend.ops.triton.triton_utils")
    properties._NUM_VECTORCORE = properties._NUM_AICORE = 4
    chunk = importlib.import_module(f"{PACKAGE}.chunk")
    chunk.get_pcp_group = lambda: SimpleNamespace(world_size=1, rank_in_group=0)
    chunk.get_forward_context = lambda: SimpleNamespace(attn_metadata=None)

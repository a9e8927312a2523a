"""The Triton kernels of vllm-ascend's chunked rule on CPU tensors, chunk by chunk.

Written from what each kernel loads and stores, because Triton's interpreter no longer has block
pointers. The functions that launch them are the release's own, and so is what they derive and
read. A program finds its sequence as the kernels do: by the number in its table, in cu_seqlens.

Import it before vllm_ascend's modules are used; `install` takes the kernels' places.
"""

from __future__ import annotations

import importlib

import device_reads
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

CHUNK = 64
PACKAGE = "vllm_ascend.ops.triton.fla"


class Kernel:
    """`kernel[grid](...)`: all programs at once, as a device would later."""

    def __init__(self, run) -> None:
        self._run = device_reads.as_kernel(run)

    def __getitem__(self, grid):
        def launch(**arguments):
            self._run(grid, **arguments)

        return launch


def _blocks(indices, starts, size: int):
    """(first token, end) of each program of a table."""
    for sequence, block in indices.tolist():
        first = int(starts[sequence]) + block * size
        yield first, min(first + size, int(starts[sequence + 1]))


def _sequences(starts, offsets):
    """(number, [(first, end)], its first chunk) of each sequence."""
    for n, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        chunks = [(at, min(at + CHUNK, end)) for at in range(start, end, CHUNK)]
        yield n, chunks, int(offsets[n])


def cumsum(grid, s, o, cu_seqlens, chunk_indices, BLOCK_T, CHUNK_SIZE, **_):
    """s, o [1, T, H]: sums within chunks; a program has BLOCK_T tokens."""
    for first, end in _blocks(chunk_indices, cu_seqlens, BLOCK_T):
        for at in range(first, end, CHUNK_SIZE):
            part = slice(at, min(at + CHUNK_SIZE, end))
            o[0, part] = s[0, part].float().cumsum(0)


def scaled_dot_kkt(grid, k, beta, g_cumsum, A, cu_seqlens, chunk_indices, **_):
    """A [1, T, H, 64] below the diagonal; beta, g [H, 1, T]."""
    group = A.shape[2] // k.shape[2]
    for first, end in _blocks(chunk_indices, cu_seqlens, CHUNK):
        keys = k[0, first:end].float().repeat_interleave(group, 1).transpose(0, 1)
        g = g_cumsum[:, 0, first:end].float()
        decay = (g[:, :, None] - g[:, None]).clamp_max(0).exp()
        scores = keys @ keys.transpose(-1, -2) * decay * beta[:, 0, first:end].float()[..., None]
        A[0, first:end, :, : end - first] = scores.tril(-1).transpose(0, 1)
        A[0, first:end, :, end - first :] = 0


def _inverse(part):
    return torch.linalg.inv(part + torch.eye(part.shape[-1]))


def solve_16(grid, A, Ad, cu_seqlens, chunk_indices, LARGE_BLOCK_T, **_):
    """Ad [1, T, H, 16], inverses of the diagonal's blocks; a program has LARGE_BLOCK_T tokens."""
    for first, end in _blocks(chunk_indices, cu_seqlens, LARGE_BLOCK_T):
        for at in range(first, end, 16):
            rows = min(16, end - at)
            column = (at - first) % A.shape[3]
            part = A[0, at : at + rows, :, column : column + rows].transpose(0, 1).float()
            Ad[0, at : at + rows, :, :rows] = _inverse(part).transpose(0, 1).to(Ad.dtype)


def merge_64(grid, A, Ad, Ai, cu_seqlens, chunk_indices, **_):
    """Ai [1, T, H, 64], inverses of whole chunks, out of those of the diagonal's blocks."""
    Ai.zero_()
    for first, end in _blocks(chunk_indices, cu_seqlens, CHUNK):
        rows = end - first
        part = A[0, first:end, :, :rows].transpose(0, 1).float()
        found = _inverse(part)
        for at in range(0, rows, 16):
            # What the kernel has of the blocks on the diagonal is what the first one left.
            size = min(16, rows - at)
            block = slice(at, at + size)
            left = Ad[0, first + at : first + at + size, :, :size].transpose(0, 1).float()
            found[:, block, block] = left
        Ai[0, first:end, :, :rows] = found.transpose(0, 1).to(Ai.dtype)


def recompute_w_u(grid, k, v, beta, w, u, A, g, cu_seqlens, chunk_indices, **_):
    """w [1, T, H, K], u [1, T, H, V]; beta, g [1, H, T]."""
    group = v.shape[2] // k.shape[2]
    for first, end in _blocks(chunk_indices, cu_seqlens, CHUNK):
        solve = A[0, first:end, :, : end - first].transpose(0, 1).float()
        scale = beta[0, :, first:end].float()[..., None]
        keys = k[0, first:end].float().repeat_interleave(group, 1).transpose(0, 1)
        decay = g[0, :, first:end].float().exp()[..., None]
        values = v[0, first:end].float().transpose(0, 1)
        u[0, first:end] = (solve @ (values * scale)).transpose(0, 1).to(u.dtype)
        w[0, first:end] = (solve @ (keys * scale * decay)).transpose(0, 1).to(w.dtype)


def scan(grid, k, v, w, v_new, g, h, h0, ht, cu_seqlens, chunk_offsets, **_):
    """Each sequence's state [H, K, V] before each of its chunks, and behind the last."""
    group = v.shape[2] // k.shape[2]
    for n, chunks, at in _sequences(cu_seqlens, chunk_offsets):
        state = h0[n].float()
        for c, (first, end) in enumerate(chunks):
            h[0, at + c] = state.to(h.dtype)
            keys = k[0, first:end].float().repeat_interleave(group, 1).transpose(0, 1)
            new = v[0, first:end].float().transpose(0, 1)
            new = new - w[0, first:end].float().transpose(0, 1) @ state
            v_new[0, first:end] = new.transpose(0, 1).to(v_new.dtype)
            total = g[0, :, first:end].float()
            last = total[:, -1:]
            left = new * (last - total).exp()[..., None]
            state = state * last.exp()[..., None] + keys.transpose(-1, -2) @ left
        ht[n] = state


def output(grid, q, k, v, h, g, o, cu_seqlens, chunk_offsets, scale, **_):
    """o [1, T, H, V]; g [1, H, T]."""
    group = v.shape[2] // k.shape[2]
    for _n, chunks, at in _sequences(cu_seqlens, chunk_offsets):
        for c, (first, end) in enumerate(chunks):
            queries, keys = (
                x[0, first:end].float().repeat_interleave(group, 1).transpose(0, 1) for x in (q, k)
            )
            total = g[0, :, first:end].float()
            decay = (total[:, :, None] - total[:, None]).clamp_max(0).exp()
            scores = (queries @ keys.transpose(-1, -2) * decay).tril()
            found = queries @ h[0, at + c].float() * total.exp()[..., None]
            found = found + scores @ v[0, first:end].float().transpose(0, 1)
            o[0, first:end] = (found * scale).transpose(0, 1).to(o.dtype)


KERNELS = {
    "cumsum.chunk_local_cumsum_scalar_kernel": cumsum,
    "chunk_scaled_dot_kkt.chunk_scaled_dot_kkt_fwd_kernel": scaled_dot_kkt,
    "solve_tril.solve_tril_16x16_kernel": solve_16,
    "solve_tril.merge_16x16_to_64x64_inverse_kernel": merge_64,
    "wy_fast.recompute_w_u_fwd_kernel": recompute_w_u,
    "chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64": scan,
    "chunk_o.chunk_fwd_kernel_o": output,
}


def _masks_of_integers(method):
    """Ascend's Triton takes masks that are not of one bit."""

    def call(self, *operands):
        operands = [
            interpreter.TensorHandle(x.data.astype(bool), x.dtype) if n == at else x
            for n, x in enumerate(operands)
        ]
        return method(self, *operands)

    at = 1 if "load" in method.__name__ else 2
    return call


def install() -> None:
    """Take the kernels' places; all others run in the interpreter, as what a device does."""
    for name, run in KERNELS.items():
        module, _, kernel = name.partition(".")
        module = importlib.import_module(f"{PACKAGE}.{module}")
        assert hasattr(module, kernel), (module, kernel)
        setattr(module, kernel, Kernel(run))
    # The interpreter gives triton.language's names another meaning, and not those taken from it.
    gates = importlib.import_module(f"{PACKAGE}.sigmoid_gating")
    if hasattr(gates, "exp"):
        gates.exp = lambda x: tl.exp(x)
    builder = interpreter.InterpreterBuilder
    for name in ("create_masked_load", "create_masked_store"):
        setattr(builder, name, _masks_of_integers(getattr(builder, name)))
    executor = interpreter.GridExecutor
    executor.__call__ = device_reads.as_kernel(executor.__call__)

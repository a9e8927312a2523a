"""What scripts/bench rope measures the rotary embedding against; _bench_rope.py says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CUDA_SOURCE = r"""
__device__ float up(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
__device__ unsigned short down(float x) {
  unsigned short r; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x)); return r;
}
__device__ float rounded(float x) { return up(down(x)); }
__device__ void turn(unsigned short* x, const unsigned short* row, int pairs, int half, int d) {
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    int head = i / half, j = i % half;
    unsigned short* a = x + (long long)head * d + j;
    float c = up(row[j]), s = up(row[half + j]), u = up(a[0]), v = up(a[half]);
    a[0] = down(__fsub_rn(rounded(__fmul_rn(u, c)), rounded(__fmul_rn(v, s))));
    a[half] = down(__fadd_rn(rounded(__fmul_rn(v, c)), rounded(__fmul_rn(u, s))));
  }
}
extern "C" __global__ void rope(const long long* positions, unsigned short* q, unsigned short* k,
    const unsigned short* cache, int half, long long stride, int q_heads, int k_heads, int d) {
  long long t = blockIdx.x;
  const unsigned short* row = cache + positions[t] * 2 * half;
  turn(q + t * stride, row, q_heads * half, half, d);
  turn(k + t * stride, row, k_heads * half, half, d);
}
"""
EMPTY_SOURCE = 'extern "C" __global__ void empty() {}'


def native(head_size: int) -> Callable[..., Any]:
    """vLLM's forward_native, NeoX style, as a formula."""
    import torch

    def turn(x: Any, cos: Any, sin: Any, rotary_dim: int) -> Any:
        heads = x.view(x.shape[0], -1, head_size)
        rotated, passed = heads[..., :rotary_dim], heads[..., rotary_dim:]
        cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
        a, b = torch.chunk(rotated, 2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((rotated, passed), dim=-1).reshape(x.shape)

    def forward(positions: Any, query: Any, key: Any, cache: Any) -> Any:
        cos, sin = cache.index_select(0, positions).chunk(2, dim=-1)
        return turn(query, cos, sin, cache.shape[1]), turn(key, cos, sin, cache.shape[1])

    return forward


def copy(target: Any, source: Any) -> None:
    """A device copy, in pieces: a single one past 512 MiB is slower on some drivers."""
    for to, piece in zip(target.split(2**27), source.split(2**27), strict=True):
        to.copy_(piece)

"""Copies between blocks of KV caches, and batched products of multi-head latent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.npu_ops.errors import require


def swap_blocks(x: Tensor, y: Tensor, z: Tensor) -> None:
    """y[to] = x[from] for each row (from, to) of z [n, 2]."""
    require(z.dim() == 2 and z.shape[1] == 2, "swap_blocks", f"z is {list(z.shape)}, not [n, 2]")
    for source, target in z.tolist():
        y[target].copy_(x[source])


def batch_matmul_transpose(
    tensor_a: Tensor,
    tensor_b: Tensor,
    tensor_c: Tensor,
    format_mode: str | None = None,
    quant_mode: str | None = None,
) -> None:
    """c [m, b, n] = a [m, b, k] times b [b, k, n], for each of the b."""
    if tensor_a.is_meta:
        return
    product = torch.einsum("mbk,bkn->mbn", tensor_a.float(), tensor_b.float())
    tensor_c.copy_(product.reshape(tensor_c.shape))


KERNELS: dict[str, Callable[..., Any]] = {
    "_C_ascend::swap_blocks": swap_blocks,
    "_C_ascend::batch_matmul_transpose": batch_matmul_transpose,
}

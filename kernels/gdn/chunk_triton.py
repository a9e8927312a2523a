"""chunk_gated_delta_rule through Triton kernels: what they take and how they are launched.

`run` is for a GPU: three launches, the longest of which waits for nothing but the state. In two,
`chunk_fused` moves fewer bytes. Triton is imported when a kernel first runs, never by importing
this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels.gdn.chunk import OPERATOR, Call
from ascend_patch.kernels.gdn.reference import NORM_EPS
from ascend_patch.kernels.triton_device import on_device

NAME = "triton"
CHUNK = 64
_SIZES = (64, 128, 256)
_PRIORITY = 10
# Programs that keep an H200's 132 multiprocessors at work. A state's columns are parted until there
# are as many: parts of 16 make a step of few heads shorter, of 64 spare many heads reading w and k
# again. Measured there: 1 x 32768 tokens, 8 heads: 0.60 ms by 16, 0.89 by 64; 8 x 1024, 32 heads:
# 0.22 by 16, 0.14 by 64.
_ENOUGH = 128
_PARTS = (64, 32, 16)
# K up to which loads run ahead of the loop; larger tiles leave no memory for that.
_DEEPEST = 128


def supports(call: Call) -> tuple[bool, str]:
    """Can the kernels take this call? (ok, reason); see ``dispatch.Implementation``."""
    if call.k.shape[2] not in _SIZES or call.v.shape[2] not in _SIZES:
        return False, "K and V must each be 64, 128 or 256"
    if call.q.dtype == torch.float32:
        return False, "q, k and v must be bfloat16 or float16"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v), ("out", call.out)):
        if x.numel() and (x.stride(-1) != 1 or x.stride(-2) != x.shape[-1]):
            return False, f"heads of a token of {name} must be adjacent in memory"
    for name, x in (("g", call.g), ("beta", call.beta)):
        if x.shape[1] > 1 and x.stride(-1) != 1:
            return False, f"heads of a token of {name} must be adjacent in memory"
    for name, state in (("initial states", call.initial), ("final states", call.final)):
        if state is not None and state.numel() and not state[0].is_contiguous():
            return False, f"a slot of the {name} must be contiguous"
    if CHUNK not in call.metadata.tables:
        return False, f"chunk_metadata must have the table of size {CHUNK}"
    return True, ""


def columns_of(width: int, sequences_heads: int, *, narrow: bool = True) -> int:
    """How many of a state's ``width`` columns one program carries.

    Args:
        width: V.
        sequences_heads: States, one for each value head of each sequence.
        narrow: Whether less than the widest part may be taken.
    """
    for part in _PARTS if narrow else _PARTS[:1]:
        if width // part * sequences_heads >= _ENOUGH:
            return part
    return _PARTS[-1] if narrow else _PARTS[0]


def runs_ahead(k: Tensor) -> bool:
    """Whether the loads of carry_kernel's loop run ahead of it, k [T, H, K] included.

    Where one does not, Triton 3.6 reads and writes out of range for parts of fewer columns than 64:
    an illegal address on an H200 with K = 256, and what compute-sanitizer found in scan_kernel.
    """
    aligned: bool = k.data_ptr() % 16 == 0 and k.stride(0) * k.element_size() % 16 == 0
    return aligned and k.shape[2] <= _DEEPEST


def run(call: Call) -> None:
    """``reference.run`` in three launches; one where no sequence has tokens, for their states."""
    with on_device(call.q.device):
        _launch(call)


def _launch(call: Call) -> None:
    from ascend_patch.kernels.gdn.carry_kernel import carry_kernel
    from ascend_patch.kernels.gdn.output_kernel import output_kernel

    sequences = len(call.starts) - 1
    if not sequences:
        return
    tokens, heads, width = call.v.shape
    size = call.k.shape[2]
    chunks = call.metadata.table(CHUNK).indices
    sizes = shared(call)
    kind = call.q.dtype
    w, u = fresh(call, tokens, heads, size, dtype=kind), fresh(call, *call.v.shape, dtype=kind)
    totals, left = (fresh(call, heads, tokens) for _ in range(2))
    lasts = fresh(call, len(chunks), heads)
    states = fresh(call, len(chunks), heads, size, width, dtype=kind)
    if len(chunks):
        parts = {"totals": totals, "left": left, "lasts": lasts, "tokens": tokens, "SCORES": False}
        prepare(call, w, u, **parts)
    columns = columns_of(width, sequences * heads, narrow=runs_ahead(call.k))
    carry_kernel[width // columns, sequences * heads](
        *(call.k, w, u, left, lasts, states, call.initial, call.final),
        *carried(call),
        *(call.metadata.cu_seqlens, call.metadata.table(CHUNK).offsets, call.k.stride(0)),
        *strides(call.initial, call.final, call.state_indices),
        tokens,
        **sizes,
        **state_constants(call),
        COLUMNS=columns,
        num_warps=4,
        num_stages=3 if size <= _DEEPEST else 1,
    )
    if len(chunks):
        columns = min(width, 128)
        output_kernel[width // columns, heads, len(chunks)](
            *(call.q, call.k, u, totals, states, call.out, call.metadata.cu_seqlens, chunks),
            *(x.stride(0) for x in (call.q, call.k, call.out)),
            tokens,
            call.scale,
            **sizes,
            COLUMNS=columns,
            NORMALISE=call.normalise,
            EPS=NORM_EPS,
            num_warps=4,
        )


def prepare(call: Call, w: Tensor, u: Tensor, *scored: Tensor | None, **parts: Any) -> None:
    """prepare_kernel on every chunk; ``scored``: lengths_q, lengths_k, p and decays, or none."""
    import triton.language as tl

    from ascend_patch.kernels.gdn.prepare_kernel import prepare_kernel

    lengths_q, lengths_k, p, decays = scored or (None,) * 4
    indices = call.metadata.table(CHUNK).indices
    prepare_kernel[len(indices), call.v.shape[1]](
        *(call.q, call.k, call.v, call.g, call.beta, lengths_q, lengths_k, w, u, p, decays),
        *(call.metadata.cu_seqlens, indices),
        *(x.stride(0) for x in (call.q, call.k, call.v, call.g, call.beta)),
        call.scale,
        **shared(call),
        NORMALISE=call.normalise,
        EPS=NORM_EPS,
        SOLVE=tl.float16,
        **parts,
        num_warps=4,
    )


def shared(call: Call) -> dict[str, int]:
    """The sizes that each kernel is compiled for."""
    heads, size, width = call.state_shape
    return {"H": call.k.shape[1], "HV": heads, "K": size, "V": width, "CHUNK": CHUNK}


def state_constants(call: Call) -> dict[str, Any]:
    """How states lie in memory, and which there are."""
    _, size, width = call.state_shape
    return {
        "STATE_K": 1 if call.state_layout == "VK" else width,
        "STATE_V": size if call.state_layout == "VK" else 1,
        "INDEXED": call.state_indices is not None,
        "INITIAL": call.initial is not None,
        "FINAL": call.final is not None,
    }


def carried(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Each sequence's slot, and whether it begins with what that holds."""
    known = call.has_initial_state
    if call.state_indices is not None and known is None:
        known = torch.ones(len(call.starts) - 1, dtype=torch.bool, device=call.q.device)
    return call.state_indices, None if known is None else known.contiguous()


def strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Between the entries of each; a model's slots are a column of its block table."""
    return tuple(0 if x is None else x.stride(0) for x in tensors)


def fresh(call: Call, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of a call's own on its device."""
    return torch.empty(shape, dtype=dtype, device=call.q.device)


def register() -> None:
    """Offer the kernels on CUDA devices."""
    from ascend_patch.kernels import dispatch
    from ascend_patch.kernels.gdn import chunk_fused

    for priority, name, form in ((_PRIORITY, NAME, run), (1, chunk_fused.NAME, chunk_fused.run)):
        offer = dispatch.Implementation(name, form, supports, priority)
        dispatch.register(OPERATOR, "cuda", offer)

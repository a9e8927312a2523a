"""chunk_gated_delta_rule through two Triton kernels: what they take and how they are launched.

Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_patch.kernels.gdn.chunk import OPERATOR, Call
from ascend_patch.kernels.gdn.reference import NORM_EPS

NAME = "triton"
CHUNK = 64
# Of a state, for one program. Parts of 32 are faster where heads are few (an H200, 32 heads of 8192
# tokens: 0.20 ms, not 0.29), but Triton 3.6 then reads shared memory out of range unless each load
# runs ahead, which strides decide.
COLUMNS = 64
_SIZES = (64, 128, 256)
_PRIORITY = 10


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


def run(call: Call) -> None:
    """``reference.run`` in two launches; one where no sequence has tokens, for their states."""
    import triton.language as tl

    from ascend_patch.kernels.gdn.prepare_kernel import prepare_kernel
    from ascend_patch.kernels.gdn.scan_kernel import scan_kernel

    sequences = len(call.starts) - 1
    if not sequences:
        return
    tokens, heads, width = call.v.shape
    key_heads, size = call.k.shape[1:]
    table = call.metadata.table(CHUNK)
    shared = {"H": key_heads, "HV": heads, "K": size, "V": width, "CHUNK": CHUNK}
    shared["NORMALISE"] = call.normalise

    def fresh(*shape: int, dtype: torch.dtype = call.q.dtype) -> Tensor:
        return torch.empty(tokens, *shape, dtype=dtype, device=call.q.device)

    w, u, p = fresh(heads, size), fresh(heads, width), fresh(heads, CHUNK)
    decays = fresh(heads, dtype=torch.float32)
    lengths = (
        [fresh(key_heads, dtype=torch.float32) for _ in "qk"] if call.normalise else [None] * 2
    )
    starts = call.metadata.cu_seqlens
    if len(table.indices):
        prepare_kernel[len(table.indices), heads](
            *(call.q, call.k, call.v, call.g, call.beta, *lengths, w, u, p, decays),
            *(starts, table.indices),
            *(x.stride(0) for x in (call.q, call.k, call.v, call.g, call.beta)),
            call.scale,
            **shared,
            EPS=NORM_EPS,
            SOLVE=tl.float16,
            num_warps=4,
        )
    constants = {
        "STATE_K": 1 if call.state_layout == "VK" else width,
        "STATE_V": size if call.state_layout == "VK" else 1,
        "INDEXED": call.state_indices is not None,
        "INITIAL": call.initial is not None,
        "FINAL": call.final is not None,
    }
    carried = call.has_initial_state
    if call.state_indices is not None and carried is None:
        carried = torch.ones(sequences, dtype=torch.bool, device=call.q.device)
    scan_kernel[width // COLUMNS, sequences * heads](
        *(call.q, call.k, w, u, p, decays, *lengths, call.initial, call.final),
        *(call.state_indices, carried),
        *(call.out, starts, call.q.stride(0), call.k.stride(0), call.out.stride(0)),
        *(0 if states is None else states.stride(0) for states in (call.initial, call.final)),
        call.scale,
        **shared,
        COLUMNS=COLUMNS,
        **constants,
        num_warps=4,
        # Loads run ahead of the loop; tiles of 256 columns leave no memory for that.
        num_stages=3 if size <= 128 else 1,
    )


def register() -> None:
    """Offer the kernels on CUDA devices."""
    from ascend_patch.kernels import dispatch

    dispatch.register(OPERATOR, "cuda", dispatch.Implementation(NAME, run, supports, _PRIORITY))

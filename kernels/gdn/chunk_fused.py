"""chunk_gated_delta_rule in two launches, which write no states but the last ones.

The fewest bytes, and what an Ascend core is given; on a GPU `chunk_triton.run` is ahead of it where
sequences are long and heads are few. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from ascend_patch.kernels.gdn import chunk_triton
from ascend_patch.kernels.gdn.chunk import Call
from ascend_patch.kernels.gdn.chunk_triton import CHUNK, fresh
from ascend_patch.kernels.triton_device import on_device

NAME = "triton-fused"
# Of a state, for one program. In parts of 32 columns Triton 3.6 reads shared memory out of range
# unless each load runs ahead of the loop, which strides decide.
COLUMNS = 64


def run(call: Call) -> None:
    """``reference.run`` in two launches; one where no sequence has tokens, for their states."""
    with on_device(call.q.device):
        _launch(call)


def _launch(call: Call) -> None:
    from ascend_patch.kernels.gdn.scan_kernel import scan_kernel

    sequences = len(call.starts) - 1
    if not sequences:
        return
    tokens, heads, width = call.v.shape
    key_heads, size = call.k.shape[1:]
    kind = call.q.dtype
    w, u, p = (fresh(call, tokens, heads, last, dtype=kind) for last in (size, width, CHUNK))
    decays = fresh(call, tokens, heads)
    lengths = [fresh(call, tokens, key_heads) if call.normalise else None for _ in "qk"]
    if len(call.metadata.table(CHUNK).indices):
        chunk_triton.prepare(call, w, u, *lengths, p, decays)
    scan_kernel[width // COLUMNS, sequences * heads](
        *(call.q, call.k, w, u, p, decays, *lengths, call.initial, call.final),
        *chunk_triton.carried(call),
        *(call.out, call.metadata.cu_seqlens),
        *(x.stride(0) for x in (call.q, call.k, call.out)),
        *chunk_triton.strides(call.initial, call.final, call.state_indices),
        call.scale,
        **chunk_triton.shared(call),
        **chunk_triton.state_constants(call),
        NORMALISE=call.normalise,
        COLUMNS=COLUMNS,
        num_warps=4,
        # Loads run ahead of the loop; tiles of 256 columns leave no memory for that.
        num_stages=3 if size <= 128 else 1,
    )

"""chunk_gated_delta_rule on an NPU: what the Triton kernels take there, and how they are launched.

Two launches a call over a fixed grid of as many programs as there are cube cores; nothing on the
device is read. Triton is imported when a kernel first runs, never by importing this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_patch.kernels import dispatch
from ascend_patch.kernels.gdn import ascend_tiles, chunk_triton
from ascend_patch.kernels.gdn.chunk import OPERATOR, Call
from ascend_patch.kernels.gdn.reference import NORM_EPS
from ascend_patch.kernels.triton_device import cube_cores, has_triton, on_device

NAME = "triton"
_PRIORITY = 10
# Of gates and caches; the vector units have no float64.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(call: Call) -> tuple[bool, str]:
    """Can the kernels take this call? (ok, reason); see ``dispatch.Implementation``."""
    ok, reason = chunk_triton.supports(call)
    if not ok:
        return ok, reason
    if any(x is not None and x.dtype not in _DTYPES for x in (call.g, call.initial, call.final)):
        return False, "gates and states must be bfloat16, float16 or float32"
    return True, ""


def run(call: Call) -> None:
    """``reference.run`` in two launches; one where no sequence has tokens, for their states."""
    cores = cube_cores(call.q.device.index or 0)
    with on_device(call.q.device):
        for kernel, programs, values, constants in launches(call, cores):
            kernel[(programs,)](*values, **constants)


def launches(call: Call, cores: int) -> list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Each launch of a call on ``cores`` cube cores: kernel, programs, values, constants by name.

    What is handed from the first to the second is allocated here.
    """
    import triton.language as tl

    from ascend_patch.kernels.gdn.ascend_prepare_kernel import prepare_loop
    from ascend_patch.kernels.gdn.ascend_scan_kernel import scan_loop

    sequences = len(call.starts) - 1
    if not sequences:
        return []
    tokens, heads, width = call.v.shape
    key_heads, size = call.k.shape[1:]
    indices = call.metadata.table(ascend_tiles.CHUNK).indices

    def fresh(*shape: int, dtype: torch.dtype = call.q.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.q.device)

    w, u = fresh(tokens, heads, size), fresh(tokens, heads, width)
    p = fresh(tokens, heads, ascend_tiles.CHUNK)
    decays = fresh(heads, tokens, dtype=torch.float32)
    # Without NORMALISE nobody reads them; a kernel takes no None for a pointer.
    lengths = [decays] * 2
    if call.normalise:
        lengths = [fresh(key_heads, tokens, dtype=torch.float32) for _ in "qk"]
    starts = call.metadata.cu_seqlens
    shared = {"H": key_heads, "HV": heads, "K": size, "V": width, "CHUNK": ascend_tiles.CHUNK}
    shared["NORMALISE"] = call.normalise
    found = []
    items = len(indices) * heads
    if items:
        values = (
            *(call.q, call.k, call.v, call.g, call.beta, *lengths, w, u, p, decays),
            *(starts, indices),
            *(x.stride(0) for x in (call.q, call.k, call.v, call.g, call.beta)),
            *(call.scale, tokens, items),
        )
        # Inverted in float16: of what a chunk's keys have in common three digits are enough, and
        # bfloat16 has two.
        constants = {"TILE": ascend_tiles.TILE, "EPS": NORM_EPS, "SOLVE": tl.float16}
        found.append((prepare_loop, min(items, cores), values, {**shared, **constants}))

    columns = ascend_tiles.scan_columns(size, width, sequences, heads, cores)
    items = sequences * heads * (width // columns)
    # Never touched where there are none.
    initial, final = (decays if x is None else x for x in (call.initial, call.final))
    slots, carried = (starts if x is None else x for x in chunk_triton.carried(call))
    values = (
        *(call.q, call.k, w, u, p, decays, *lengths, initial, final, slots, carried, call.out),
        *(starts, call.q.stride(0), call.k.stride(0), call.out.stride(0)),
        *(x.stride(0) for x in (initial, final, slots)),
        *(call.scale, tokens, items),
    )
    constants = {
        "COLUMNS": columns,
        "KV": call.state_layout == "KV",
        "INDEXED": call.state_indices is not None,
        "CARRIED": carried is not starts,
        "INITIAL": call.initial is not None,
        "FINAL": call.final is not None,
    }
    found.append((scan_loop, min(items, cores), values, {**shared, **constants}))
    return found


def register() -> bool:
    """Offer the kernels on NPUs; whether this process has Triton for Ascend.

    Not by default: they have been compiled and executed in their lowered form, and never run on an
    NPU. A self-test that compares them on the machine itself calls this first.
    """
    if not has_triton("ascend"):
        return False
    dispatch.register(OPERATOR, "npu", dispatch.Implementation(NAME, run, supports, _PRIORITY))
    return True

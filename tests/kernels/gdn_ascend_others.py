"""The static score of the gated delta rule's other kernels: gates, decode step, convolutions, norm.

    python tests/kernels/gdn_ascend_others.py       # prints JSON, as gdn_ascend.py does

A layer of Qwen3-Next on a rank of 1 or 8: a prefill of 8192 tokens, a decode step of 1, 32 or 256
requests. These kernels have no matrix products: their programs run on vector cores alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ascend_offline
import torch
from gdn_ascend import score
from gdn_ascend_calls import VECTOR_CORES, Launch, _named

from ascend_patch.kernels import dispatch, gdn
from ascend_patch.kernels.gdn import (
    cases,
    conv,
    conv_tiles,
    conv_triton,
    gated_norm,
    gated_norm_triton,
    gating,
    gating_triton,
    recurrent,
    recurrent_triton,
)

DTYPE = torch.bfloat16
SIZE, WINDOW, TOKENS = 128, 4, 8192
BATCHES = (1, 32, 256)
RANKS = (1, 8)


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def of(operator: str, call: Any) -> Launch:
    """The launch that an operator's module makes of a call on an NPU."""
    if operator == gating.OPERATOR:
        from ascend_patch.kernels.gdn.gating_kernel import gating_kernel as kernel

        values, constants = gating_triton.arguments(call, "npu")
        programs = min(-(-call.a.shape[0] // constants["ROWS"]), VECTOR_CORES)
    elif operator == recurrent.OPERATOR:
        from ascend_patch.kernels.gdn.recurrent_kernel import recurrent_kernel as kernel

        tiles = recurrent_triton.tiles(call, "npu")
        values, constants = recurrent_triton.arguments(call, tiles, "npu")
        programs = min(recurrent_triton.item_count(call, tiles), VECTOR_CORES)
    elif operator == gated_norm.OPERATOR:
        from ascend_patch.kernels.gdn.gated_norm_kernel import gated_norm_kernel as kernel

        layout = gated_norm_triton._layout(call)
        assert layout is not None
        tiles = gated_norm_triton.tiles_of(*layout[:2], call.group, "npu")
        values, constants = gated_norm_triton.arguments(call, tiles)
        programs = min(values[gated_norm_triton.ITEMS], VECTOR_CORES)
    else:
        return _convolution(operator, call)
    return Launch(kernel, (programs, 1, 1), _named(kernel, values) | constants)


def _convolution(operator: str, call: Any) -> Launch:
    channels, width = call.x.shape[1], call.x.element_size()
    if operator == conv.OPERATOR:
        from ascend_patch.kernels.gdn.conv_kernel import conv_kernel as kernel

        tiles = conv_tiles.prefill_tiles(channels, width, "npu")
        values, constants = conv_triton.arguments(call, tiles, "npu")
        items = values[conv_triton.CHUNKS]
    else:
        from ascend_patch.kernels.gdn.conv_update_kernel import conv_update_kernel as kernel

        tiles = conv_tiles.update_tiles(channels, width, "npu")
        values, constants = conv_triton.update_arguments(call, tiles, "npu")
        items = call.sequences
    programs = conv_tiles.programs(items, channels, tiles, VECTOR_CORES)
    return Launch(kernel, (programs, 1, 1), _named(kernel, values) | constants)


def size(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def calls() -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """(name, bytes that must be moved, operator, arguments)."""
    for rank in RANKS:
        key_heads, heads = cases.TENSOR_PARALLEL[rank]
        channels = (2 * key_heads + heads) * SIZE
        vector = meta(heads, dtype=torch.float32)
        weight = meta(channels, WINDOW)
        gates = {"A_log": vector, "dt_bias": meta(heads)}
        ab = {name: meta(TOKENS, heads) for name in "ab"}
        moved = size(*ab.values()) + 8 * TOKENS * heads
        yield f"gates-{TOKENS}-tp{rank}", moved, gdn.fused_gating, {**ab, **gates}
        starts = torch.tensor([0, TOKENS])
        chunks = gdn.build_chunk_metadata(starts, torch.device("cpu"))
        x = meta(TOKENS, channels)
        state = meta(9, channels, WINDOW - 1)
        one = torch.ones(1, dtype=torch.int32)
        given = {"conv_state": _rows(state), "state_indices": one, "chunk_metadata": chunks}
        given |= {"x": x, "weight": weight, "activation": "silu", "has_initial_state": one.bool()}
        moved = 2 * size(x) + size(weight) + 2 * size(state[0])
        yield f"conv-prefill-{TOKENS}-tp{rank}", moved, gdn.causal_conv1d, given
        rows = meta(TOKENS, heads, SIZE)
        given = {"x": rows, "gate": meta(TOKENS, heads, SIZE), "weight": meta(SIZE), "eps": 1e-6}
        yield f"norm-{TOKENS}-tp{rank}", 3 * size(rows), gdn.gated_rms_norm, given
        for batch in BATCHES:
            slots = torch.arange(batch, dtype=torch.int32) + 1
            x = meta(batch, channels)
            state = meta(batch + 1, channels, WINDOW - 1)
            given = {"x": x, "conv_state": _rows(state), "weight": weight, "activation": "silu"}
            moved = 2 * size(x) + size(weight) + 2 * size(state[1:])
            given["state_indices"] = slots
            yield f"conv-decode-{batch}-tp{rank}", moved, gdn.causal_conv1d_update, given
            q, k = (meta(1, batch, key_heads, SIZE) for _ in "qk")
            v = meta(1, batch, heads, SIZE)
            cache = meta(batch + 1, heads, SIZE, SIZE, dtype=torch.float32)
            given = {"q": q, "k": k, "v": v, "state": cache, "state_layout": "VK", **gates}
            given |= {name: meta(batch, heads) for name in "ab"}
            moved = size(q, k, v, v) + 2 * size(cache[1:]) + 4 * batch * heads
            given |= {"state_indices": slots, "use_qk_l2norm_in_kernel": True}
            yield f"decode-{batch}-tp{rank}", moved, gdn.recurrent_gated_delta_rule, given


def _rows(state: torch.Tensor) -> torch.Tensor:
    """The same shape, with the channels of a place side by side, as vLLM's caches are."""
    return state.transpose(1, 2).contiguous().transpose(1, 2)


def rows() -> Iterator[tuple[str, object]]:
    found: list[Launch] = []
    operators = (gating, recurrent, gated_norm, conv)
    names = [module.OPERATOR for module in operators] + [conv.UPDATE]
    for name in names:

        def note(call: Any, name: str = name) -> None:
            found.append(of(name, call))

        dispatch.register(name, "meta", dispatch.Implementation("noted", note, priority=99))
    for case, least, operator, given in calls():
        found.clear()
        operator(**given)
        about = {"operator": operator.__name__, "least": least}
        yield case, {**about, "launches": score(found), "copies": [0, 0]}


if __name__ == "__main__":
    ascend_offline.activate()
    print(json.dumps({"versions": ascend_offline.versions(), "rows": dict(rows())}))

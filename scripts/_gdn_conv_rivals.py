"""Whom scripts/bench gdn_conv times: vLLM's functions, and ours with every tile."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

PREFILL_TILES = tuple(itertools.product((128, 256, 512), (4, 8, 16, 32), (2, 4, 8)))
UPDATE_TILES = tuple(itertools.product((64, 128, 256, 512, 1024), (1, 2, 4)))
NORM_TILES = tuple(itertools.product((2, 4, 8, 16, 32, 64), (1, 2, 4, 8)))


def vllm(site: str) -> Any:
    """vLLM 0.18.0's functions, or None with a line that says why not."""
    try:
        if site:
            sys.path.append(site)
        from vllm.model_executor.layers.fla.ops.layernorm_guard import rmsnorm_fn
        from vllm.model_executor.layers.mamba.ops import causal_conv1d
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata
    except Exception as error:
        print(f"vLLM is not measured: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return SimpleNamespace(
        prefill=causal_conv1d.causal_conv1d_fn,
        update=causal_conv1d.causal_conv1d_update,
        metadata=compute_causal_conv1d_metadata,
        norm=rmsnorm_fn,
    )


def tiled(what: str, ours: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ours with each tile in place of the table's."""
    from ascend_patch.kernels.gdn import conv_tiles, gated_norm_triton

    module: Any = conv_tiles
    name = f"{what}_tiles"
    if what == "prefill":
        tiles = {
            f"{c}x{t} w{w}": conv_tiles.Tiles(c, t, w, rolls=False)
            for c, t, w in PREFILL_TILES
            if c * t <= 2048 * w
        }
        tiles |= {f"{c} rolls w{c // 64}": conv_tiles.Tiles(c, 1, c // 64) for c in (128, 256, 512)}
    elif what == "update":
        tiles = {f"{c} w{w}": conv_tiles.Tiles(c, warps=w) for c, w in UPDATE_TILES}
    else:
        module, name = gated_norm_triton, "tiles_of"
        tiles = {f"{r} w{w}": gated_norm_triton.Tiles(r, w) for r, w in NORM_TILES if r <= 16 * w}
    table = getattr(module, name)
    try:
        for who, chosen in tiles.items():
            setattr(module, name, lambda *_, chosen=chosen: chosen)
            yield who, ours
    finally:
        setattr(module, name, table)

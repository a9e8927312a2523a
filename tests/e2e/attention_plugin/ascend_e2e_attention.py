"""Notes what the emulated device routes, and misroutes it on demand, in a running server.

A vLLM plugin (this folder goes on PYTHONPATH), so it reaches every worker and the shim knows
nothing of it. E2E_ATTENTION_FOLDER names a folder: each state and row that a batch had becomes an
empty file in its `seen`, and the file `fault` names a fault of FAULTS, which may change at any
time; anything else changes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

# window: one key more in sight. pooling: vllm-ascend 0.13's routing, this step's keys alone.
FAULTS = ("window", "pooling")


def install() -> None:
    if "E2E_ATTENTION_FOLDER" not in os.environ:
        return
    from ascend_patch.impl import attention_vllm_backend as backend

    folder = Path(os.environ["E2E_ATTENTION_FOLDER"])
    (folder / "seen").mkdir(parents=True, exist_ok=True)
    backend.route = watched(backend.route, folder)
    backend.attend = breakable(backend.attend)


def watched(route: Any, folder: Path) -> Any:
    def watch(case: Any) -> Any:
        found = route(case)
        (folder / "seen" / f"{case.state} {found.row}").touch()
        fault = read(folder / "fault")
        if fault == "window" and found.pre_tokens is not None:
            return dataclasses.replace(found, pre_tokens=found.pre_tokens + 1)
        if fault == "pooling" and case.pooling and case.causal:
            return dataclasses.replace(found, row=fault)
        return found

    return watch


def breakable(attend: Any) -> Any:
    import torch

    from ascend_patch.kernels.attention.attend import causal_mask

    def broken(route: Any, batch: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any):
        if route.row != "pooling":
            return attend(route, batch, query, key, value, *rest, **more)
        out, end = rest[2], batch.end
        lengths = batch.ends
        out[:end] = torch.ops.npu.npu_fusion_attention(
            query[:end].contiguous(),
            key[:end].contiguous(),
            value[:end].contiguous(),
            more["num_heads"],
            "TND",
            atten_mask=causal_mask(query.device).bool(),
            scale=more["scale"],
            actual_seq_qlen=lengths,
            actual_seq_kvlen=lengths,
            sparse_mode=3,
        )[0]
        return None

    return broken


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

"""Run by test_gdn_vllm_trial.py: which layers the Triton kernels take, interpreted on a CPU.

    TRITON_INTERPRET=1 python gdn_trial.py

Prints JSON: for each layer why its prefill is the release's; empty where it is ours.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ascend_patch.impl import gdn_vllm_trial as trial
from ascend_patch.kernels import dispatch

HEADS, VALUE_HEADS, WIDTH, DRAFTS = 1, 2, 4, 2


def layer(key: int, value: int, drafts: int) -> torch.nn.Module:
    made = torch.nn.Module()
    channels = 2 * HEADS * key + VALUE_HEADS * value
    weight = torch.zeros(channels, 1, WIDTH, dtype=torch.bfloat16)
    made.conv1d = types.SimpleNamespace(weight=weight, bias=None)
    made.A_log = torch.zeros(VALUE_HEADS)
    made.dt_bias = torch.ones(VALUE_HEADS, dtype=torch.bfloat16)
    made.activation, made.num_spec = "silu", drafts
    return made


def refusal(
    key: int,
    value: int,
    layout: str,
    dtype: torch.dtype,
    *,
    drafts: int = 0,
    transposed: bool = False,
) -> str:
    """Of a layer whose states lie in pages with something behind each."""
    made = layer(key, value, drafts)
    channels = made.conv1d.weight.shape[0]
    state = VALUE_HEADS, *((value, key) if layout == "VK" else (key, value))
    if transposed:
        states = torch.empty(3, VALUE_HEADS, *state[:0:-1]).transpose(-1, -2)
    else:
        states = torch.empty(3, VALUE_HEADS * key * value + 1024)[:, :-1024].view(3, *state)
    conv = torch.empty(3, WIDTH - 1 + drafts, channels, dtype=dtype).transpose(1, 2)
    given = {"conv_state": conv, "ssm_state": states}
    return trial.refusal(made, dtype, layout, drafts > 0, **given)


def main() -> None:
    for name in trial.OPERATORS:
        for offer in dispatch.candidates(name, "cuda"):
            if offer.name == trial.KERNELS:
                dispatch.register(name, "cpu", offer)
    trial.BATCHES = (1, 2)
    half = torch.bfloat16
    found = {
        "VK": refusal(64, 64, "VK", half),
        "KV, K and V different": refusal(64, 128, "KV", half),
        "drafts": refusal(64, 64, "VK", half, drafts=DRAFTS),
        "heads of 32": refusal(32, 64, "VK", half),
        "heads of 32, drafts": refusal(32, 64, "VK", half, drafts=DRAFTS),
        "float32": refusal(64, 64, "VK", torch.float32),
        "states that are no contiguous slots": refusal(64, 64, "VK", half, transposed=True),
    }
    dispatch.unregister("fused_gating", "cpu", trial.KERNELS)
    found["withdrawn"] = refusal(64, 64, "VK", half)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

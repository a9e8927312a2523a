"""Run by test_gdn_conv_vllm.py: vLLM's own convolution kernels, interpreted, beside our reference.

    python gdn_conv_vllm.py SEED FOLDER...    # folders of vLLM releases, each with vllm/ in it

Nothing of vLLM is imported but the files of the kernels. Prints JSON: for each folder and case the
largest error as a share of what one rounding and float32 sums allow.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from gdn_conv_judge import judge_conv
from gdn_conv_oracle import ConvCase

OPS = Path("vllm", "model_executor", "layers", "mamba", "ops", "causal_conv1d.py")
PAD = -1
RAGGED = (1, 0, 2, 64, 21, 3)
# vLLM's prefill: all sequences have slots and has_initial_state.
PREFILL = (
    *(ConvCase(RAGGED, width=width, places=width + 1, table=False) for width in (2, 3, 4)),
    ConvCase(RAGGED, padded=(2, 4), bias=False, silu=False, table=False, channels=300),
)
UPDATE = (
    *(ConvCase((1,) * 4, width=width, plain=True, places=6) for width in (2, 3, 4, 5)),
    ConvCase((1,) * 4, plain=True, padded=(0, 3), cache="gaps", channels=300, silu=False),
    # Queries of one length, where it keeps as many inputs of all.
    ConvCase((3, 3), bias=False),
    *(
        ConvCase((3, 0, 1, 2), width=width, places=width + 2, accepted=(1, 2, 3, 1), tail=1)
        for width in (2, 3, 4, 5)
    ),
    ConvCase((4, 4, 4), places=6, accepted=(4, 1, 2), padded=(1,)),
)


def load(folder: Path) -> types.ModuleType:
    """The file of a release, with what it imports: Triton by vLLM's name for it, and a number."""
    utils = types.ModuleType("vllm.triton_utils")
    utils.triton, utils.tl = triton, tl  # type: ignore[attr-defined]
    names = ["vllm", "vllm.v1", "vllm.attention"]
    parts = ("vllm.v1.attention", "vllm.attention.backends", "vllm.v1.attention.backends")
    names += [*parts, "vllm.attention.backends.utils", "vllm.v1.attention.backends.utils"]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].PAD_SLOT_ID = PAD  # type: ignore[attr-defined]
    sys.modules["vllm.triton_utils"] = utils
    name = f"conv_{folder.name.replace('.', '_').replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, folder / OPS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._causal_conv1d_fwd_kernel = Launch(module._causal_conv1d_fwd_kernel)
    return module


class Launch:
    """A kernel whose grid is computed on the host's own tensors, as a real launch does it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(*values: Any, **named: Any) -> None:
            arguments = {**dict(zip(self.kernel.arg_names, values, strict=False)), **named}
            self.kernel[grid(arguments)](*values, **named)

        return run


def prefill(module: Any, has_state: bool = True) -> Any:
    def run(x: Any, weight: Any, bias: Any, activation: Any, conv_state: Any, **rest: Any) -> Any:
        carried = rest["has_initial_state"]
        found = module.causal_conv1d_fn(
            x.transpose(0, 1),
            weight,
            bias,
            activation=activation,
            conv_states=conv_state,
            has_initial_state=carried if has_state else torch.zeros_like(carried),
            cache_indices=rest["state_indices"],
            query_start_loc=rest["query_start_loc"],
        )
        return found.transpose(0, 1)

    return run


def update(module: Any) -> Any:
    def run(x: Any, conv_state: Any, weight: Any, bias: Any, **rest: Any) -> Any:
        # It writes where it reads.
        return module.causal_conv1d_update(
            x.clone(),
            conv_state,
            weight,
            bias,
            rest["activation"],
            conv_state_indices=rest["state_indices"],
            num_accepted_tokens=rest.get("num_accepted_tokens"),
            query_start_loc=rest.get("query_start_loc"),
            max_query_len=rest.get("max_query_len", -1),
        )

    return run


def live(run: Any, case: ConvCase) -> Any:
    """Rows that nobody asked for are zero for the judge: vLLM leaves them as it found them."""
    wanted = [n not in case.padded for n, count in enumerate(case.lengths) for _ in range(count)]
    rows = torch.tensor([*wanted, *[False] * case.tail])

    def masked(**given: Any) -> Any:
        return run(**given).masked_fill(~rows[:, None], 0.0)

    return masked


def judge(folder: Path, seed: int) -> dict[str, float]:
    module = load(folder)
    found = {}
    for case in PREFILL:
        found[f"prefill {case}"] = judge_conv(case, seed, run=live(prefill(module), case))
    for case in UPDATE:
        run = live(update(module), case)
        found[f"update {case}"] = judge_conv(case, seed, run=run, update=True)
    long = ConvCase((9,) * 12, table=False)
    found["control"] = judge_conv(long, seed, run=prefill(module, has_state=False))
    return found


if __name__ == "__main__":
    seed = int(sys.argv[1])
    print(json.dumps({Path(f).name: judge(Path(f), seed) for f in sys.argv[2:]}))

"""Run by test_gdn_recurrent_vllm.py: vLLM's own decode kernels, interpreted, beside our reference.

    python gdn_decode_vllm.py SEED FOLDER...    # folders of vLLM releases, each with vllm/ in it

Nothing of vLLM is imported but the files of the kernels. Prints JSON: for each folder and function
the largest relative errors, by case. `control` has the layout of the other releases.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import gdn_judge
import torch
import triton
import triton.language as tl
from gdn_decode_gates import make_gates
from gdn_decode_oracle import DecodeCase, DecodeInputs, make_decode

from ascend_patch.kernels import gdn

OPS = Path("vllm", "model_executor", "layers", "fla", "ops")
MODELS = (
    Path("vllm", "model_executor", "models", "qwen3_next.py"),
    Path("vllm", "model_executor", "layers", "mamba", "gdn_linear_attn.py"),
)
SIZES = {"key_heads": 2, "value_heads": 4}
PLAIN = DecodeCase(3, **SIZES)
PADDED = DecodeCase(3, padded=(0, 2), **SIZES)
LENGTHS = DecodeCase(lengths=(1, 0, 1), **SIZES)
DRAFTED = DecodeCase(lengths=(3, 1, 0, 2), width=3, **SIZES)
DRAFTED_PADDED = DecodeCase(lengths=(3, 1, 2), width=3, padded=(1,), **SIZES)


def stand_ins() -> None:
    """What the files import: Triton by vLLM's name for it, and the exponential."""
    utils = types.ModuleType("vllm.triton_utils")
    utils.triton, utils.tl, utils.tldevice = triton, tl, tl  # type: ignore[attr-defined]
    sys.modules["vllm"] = types.ModuleType("vllm")
    sys.modules["vllm.triton_utils"] = utils


def load(file: Path, package: str) -> types.ModuleType:
    """A file as a module of a package that has nothing but `op`."""
    op = types.ModuleType(f"{package}.op")
    # The interpreter puts its own functions into triton.language while a kernel runs.
    op.exp = lambda x: tl.exp(x)  # type: ignore[attr-defined]
    sys.modules[package], sys.modules[f"{package}.op"] = types.ModuleType(package), op
    spec = importlib.util.spec_from_file_location(f"{package}.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gating_of(folder: Path) -> Any:
    """fused_gdn_gating of a release, out of its model's file."""
    for text in (folder.joinpath(path).read_text() for path in MODELS if (folder / path).exists()):
        wanted = ("fused_gdn_gating_kernel", "fused_gdn_gating")
        nodes = [n for n in ast.parse(text).body if getattr(n, "name", "") in wanted]
        if len(nodes) == 2:
            lines = text.splitlines()
            parts = ["import torch", "from vllm.triton_utils import tl, triton"]
            for node in nodes:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                parts += lines[first - 1 : node.end_lineno]
            file = Path(tempfile.mkdtemp(), "gating.py")
            file.write_text("\n".join(parts) + "\n")
            return load(file, f"gating_{folder.name.replace('.', '_')}").fused_gdn_gating
    raise LookupError(f"no fused_gdn_gating in {folder}")


def compare(case: DecodeCase, seed: int, theirs: Any) -> float:
    """The larger of the relative differences in outputs, where there is a state, and in caches."""
    inputs, other = make_decode(case, seed), make_decode(case, seed)
    wanted = gdn.recurrent_gated_delta_rule(**inputs.arguments)
    found = theirs(other, other.arguments)
    rows = [n for n, c in enumerate(case.counts) for _ in range(c) if n not in case.padded]
    live = torch.tensor([n in rows for n, c in enumerate(case.counts) for _ in range(c)])
    pairs = [
        (found.reshape(wanted.shape)[0, live], wanted[0, live]),
        (other.arguments["state"], inputs.arguments["state"]),
    ]
    assert not torch.equal(other.arguments["state"], other.before), "vLLM wrote no state"
    return max(
        gdn_judge.relative(got.double().numpy(), want.double().numpy()) for got, want in pairs
    )


def recurrent(module: Any) -> Any:
    def run(_: DecodeInputs, given: dict) -> torch.Tensor:
        return module.fused_recurrent_gated_delta_rule(
            **{name: given[name].contiguous() for name in ("q", "k", "v", "g", "beta")},
            initial_state=given["state"],
            inplace_final_state=True,
            cu_seqlens=given["cu_seqlens"].long(),
            ssm_state_indices=given["state_indices"],
            num_accepted_tokens=given.get("num_accepted_tokens"),
            use_qk_l2norm_in_kernel=True,
        )[0]

    return run


def sigmoid(module: Any) -> Any:
    def run(_: DecodeInputs, given: dict) -> torch.Tensor:
        return module.fused_sigmoid_gating_delta_rule_update(
            **{name: given[name] for name in ("A_log", "a", "b", "dt_bias", "q", "k", "v")},
            initial_state=given["state"],
            inplace_final_state=True,
            cu_seqlens=given["cu_seqlens"].long(),
            ssm_state_indices=given["state_indices"],
            num_accepted_tokens=given.get("num_accepted_tokens"),
            use_qk_l2norm_in_kernel=True,
        )[0]

    return run


def packed(module: Any) -> Any:
    def run(inputs: DecodeInputs, given: dict) -> torch.Tensor:
        q, k, v = (given[name][0].flatten(1) for name in ("q", "k", "v"))
        out = torch.full((v.shape[0], 1, *given["v"].shape[2:]), float("nan"))
        module.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=torch.cat((q, k, v), 1),
            **{name: given[name] for name in ("a", "b", "A_log", "dt_bias")},
            scale=inputs.case.key_size**-0.5,
            initial_state=given["state"],
            out=out,
            ssm_state_indices=given["state_indices"],
            use_qk_l2norm_in_kernel=True,
        )
        assert (out[list(inputs.case.padded)] == 0).all(), "packed_decode's padding is not zero"
        return out

    return run


def gates(function: Any, seed: int) -> float:
    """0.11.0's has no b; the arguments of all are contiguous."""
    given = {name: x.contiguous() for name, x in make_gates(9, 12, "float32", seed).items()}
    wanted = gdn.fused_gating(**given)
    if "b" not in function.__annotations__:
        del given["b"]
        found = (function(**given)[None],)
    else:
        found = function(**given)
    pairs = zip(found, wanted, strict=False)
    return max(gdn_judge.relative(a.double().numpy(), b.double().numpy()) for a, b in pairs)


def judge(folder: Path, seed: int) -> dict[str, float]:
    version = tuple(map(int, folder.name.removeprefix("vllm-").split(".")))
    layout = {"layout": "VK" if version >= (0, 16, 0) else "KV"}
    package = f"ops_{folder.name.replace('.', '_')}"
    module = load(folder / OPS / "fused_recurrent.py", package)
    found = {"fused_gdn_gating": gates(gating_of(folder), seed)}
    skips = version >= (0, 16, 0)

    def note(name: str, cases: tuple[DecodeCase, ...], run: Any, **more: Any) -> None:
        for case in cases:
            case = DecodeCase(**{**vars(case), **layout, **more})
            found[f"{name} {case}"] = compare(case, seed, run)

    with_lengths = (LENGTHS, DRAFTED, DRAFTED_PADDED) if skips else (LENGTHS, DRAFTED)
    note("fused_recurrent", with_lengths, recurrent(module), raw=False)
    if version >= (0, 18, 0):
        gated = load(folder / OPS / "fused_sigmoid_gating.py", package)
        note("fused_sigmoid_gating", with_lengths, sigmoid(gated))
        note("packed_decode", (PLAIN, PADDED), packed(module))
    other = {"layout": "KV" if skips else "VK", "raw": False, "key_size": 64, "value_size": 64}
    swapped = DecodeCase(**{**vars(LENGTHS), **other})
    found["control"] = compare(swapped, seed, recurrent(module))
    return found


if __name__ == "__main__":
    stand_ins()
    seed = int(sys.argv[1])
    print(json.dumps({Path(f).name: judge(Path(f), seed) for f in sys.argv[2:]}))

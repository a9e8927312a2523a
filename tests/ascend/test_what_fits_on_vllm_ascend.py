"""For which head counts the releases' RoPE kernels compile for an Ascend core: ours takes the rest.

No NPU is needed, but an interpreter with triton-ascend: ASCEND_TRITON_PYTHON names it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import ascend_child
import pytest
from environment import Environment

from ascend_patch.impl import rotary_ascend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# The module alone: what it imports of vLLM and vllm-ascend is not needed to compile a kernel.
COMPILE = """
import importlib.util, json, sys, types
import ascend_offline
ascend_offline.activate()
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def module(name, **names):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(names)

module("torch", Tensor=object)
for name in ("vllm", "vllm_ascend", "vllm_ascend.ops", "vllm_ascend.ops.triton"):
    module(name)
module("vllm.triton_utils", tl=tl, triton=triton)
module("vllm_ascend.ops.triton.triton_utils", get_vectorcore_num=lambda: 40)
spec = importlib.util.spec_from_file_location("release_rope", sys.argv[1])
rope = importlib.util.module_from_spec(spec)
sys.modules["release_rope"] = rope
spec.loader.exec_module(rope)
kernel = rope._triton_rope
TARGET = GPUTarget("npu", ascend_offline.ARCHITECTURE, 0)

def compiles(queries, keys, size, width, neox):
    power = triton.next_power_of_2
    pads = power(queries), power(keys)
    constants = dict(
        n_qh=queries, n_kh=keys, hd=size, rope_dim=width, pad_n_qh=pads[0], pad_n_kh=pads[1],
        pad_rope_dim=power(width), BLOCK_SIZE=max(pads), BLOCK_SIZE_HEAD=64 if neox else 32,
        IS_NEOX_STYLE=neox, USE_COS_SIN=True, cos_ptr=None, cos_row_stride=None, sin_ptr=None,
        sin_row_stride=None)
    constants = {name: c for name, c in constants.items() if name in kernel.arg_names}
    kinds = dict.fromkeys(("q_ptr", "k_ptr", "cos_sin_ptr"), "*bf16") | {"pos_ptr": "*i64"}
    signature = {n: kinds.get(n, "i32") for n in kernel.arg_names if n not in constants}
    try:
        triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
    except Exception as error:
        assert "overflow" in str(error), error
        return False
    return True

print(json.dumps([compiles(*case) for case in json.loads(sys.argv[2])]))
"""

# Query heads, key heads, head size, rotary_dim, NeoX style.
CASES = [
    (8, 1, 128, 128, True),
    (64, 8, 128, 128, True),
    (96, 8, 128, 64, True),
    (128, 64, 128, 128, True),
    (128, 128, 128, 128, True),
    (64, 64, 256, 256, True),
    (8, 1, 256, 256, True),
    (8, 1, 512, 512, True),
    (32, 8, 128, 128, False),
    (40, 8, 128, 128, False),
    (1, 64, 128, 128, False),
    (64, 8, 128, 64, False),
    (128, 8, 128, 64, False),
    (16, 16, 256, 256, False),
    (8, 1, 256, 256, False),
]


@pytest.mark.parametrize(
    ("release", "fits"),
    [("0.18.0", rotary_ascend.fits_whole), ("0.23.0", rotary_ascend.fits_tiled)],
)
def test_ours_takes_what_the_release_s_kernel_does_not_compile_for(release, fits):
    ascend_child.needs_compiler()
    environment = Environment(release)
    environment.build()
    (source,) = environment.folder.glob(
        "venv/lib/python3*/site-packages/vllm_ascend/ops/triton/rope.py"
    )
    done = subprocess.run(
        [ascend_child.PYTHON, "-c", COMPILE, str(source), json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests/kernels")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))
    print(release, found)
    expected = {case: fits(case[0], case[1], case[3], case[4]) for case in CASES}
    assert found == expected
    assert set(found.values()) == {True, False}

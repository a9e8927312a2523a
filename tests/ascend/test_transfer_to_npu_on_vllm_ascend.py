"""torch_npu's transfer_to_npu, which replaces some sixty functions of torch, beside the patches."""

from __future__ import annotations

import json
import os
import secrets

import pytest
from ascend_case import PLATFORM, START, WITH_TRITON, Host

pytestmark = pytest.mark.slow

TRANSFER = "import torch, torch_npu\nfrom torch_npu.contrib import transfer_to_npu\n"

ROTATE = """
import vllm_ascend.ops.register_custom_ops
import vllm_ascend.ops.rotary_embedding
import vllm_ascend.ops.triton.triton_utils as triton_utils
triton_utils._NUM_VECTORCORE = 3
OPERATOR = torch.ops.vllm.npu_rotary_embedding.default

def error(width, size=192, heads=3, tokens=7):
    'Of the operator that an NPU runs against rotation in float64, in units of the last place.'
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(0, 64, (tokens,), generator=generator)
    q, k = (torch.randn(tokens, n * size, generator=generator) for n in (heads, 1))
    cache = rotary_oracle.cache(64, width, torch.float32)
    turns = numpy.exp(1j * rotary_oracle.angles(64, width)[rows.numpy()])[:, None]
    got = OPERATOR.redispatch(NPU, rows, q.clone(), k.clone(), cache, size, width, True)
    expected = (rotary_oracle.rotate(x.double().numpy().reshape(tokens, -1, size), turns)
                for x in (q, k))
    return max(rotary_oracle.error(g, e) for g, e in zip(got, expected))

def torch_is():
    'Where what transfer_to_npu replaces is from.'
    found = torch.cuda.is_available, torch.empty, torch.jit.script
    return [f.__code__.co_filename.rpartition("/")[2] if hasattr(f, "__code__") else "torch"
            for f in found]
"""

SAY = """
import ascend_patch
found = {"errors": {n: error(n) for n in (64, 96, 192)}, "torch": torch_is()}
runtime = ascend_patch._runtime.current()
runtime.look_again()
status = ascend_patch.status()
found["targets"] = [[t["id"], t["state"], t["reason"]] for t in rotary()["targets"]]
found["calls"], found["kernels"] = calls(), kernels()
found["peers"], found["problems"] = status["peers"], status["problems"]
found["device"] = [status["device"], status["host"]]
ascend_patch.revert("rotary")
found["reverted"], found["torch after"] = error(96), torch_is()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ascend() -> Host:
    return Host("0.18.0")


@pytest.fixture(scope="module")
def drawn() -> int:
    """One seed for all, so that counts can be compared; ASCEND_PATCH_SEED sets it."""
    chosen = int(os.environ.get("ASCEND_PATCH_SEED", secrets.randbelow(2**31)))
    print(f"repeat with ASCEND_PATCH_SEED={chosen}")
    return chosen


def look(ascend: Host, seed: int, when: str) -> dict:
    """What is found if it is imported before vLLM, before or after vllm-ascend's operators."""
    parts = {"before vLLM": WITH_TRITON, "between": PLATFORM, "after": ROTATE}
    code = START
    for part in (WITH_TRITON, PLATFORM, ROTATE):
        code += part + (TRANSFER if part == parts.get(when) else "")
    printed = ascend.run(f"SEED = {seed}\n{code}{SAY}", patches="all")
    found = json.loads(printed.strip().splitlines()[-1])
    print(when, found)
    return found


@pytest.fixture(scope="module")
def without(ascend: Host, drawn: int) -> dict:
    found = look(ascend, drawn, "never")
    assert found["peers"] == []
    assert "transfer_to_npu.py" not in found["torch"]
    return found


@pytest.mark.parametrize("when", ["before vLLM", "between", "after"])
def test_both_are_in_force_and_a_revert_leaves_torch_as_it_is(ascend, drawn, without, when):
    found = look(ascend, drawn, when)
    assert max(found["errors"].values()) < 4
    # The release's own operator, for a width that it gets wrong.
    assert found["reverted"] > 1e5
    for name in ("targets", "calls", "kernels", "device", "problems"):
        assert found[name] == without[name], name
    assert {state for _, state, _ in found["targets"]} == {"applied"}
    assert found["calls"] == {"npu_rotary_embedding": 3}
    assert found["torch"][2] == "transfer_to_npu.py"
    assert found["torch"] != without["torch"]
    assert found["torch after"] == found["torch"]
    (named,) = found["peers"]
    assert named.startswith("torch_npu.contrib.transfer_to_npu (torch-npu 2.")

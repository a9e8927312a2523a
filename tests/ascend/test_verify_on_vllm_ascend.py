"""VERIFY and the self-test on the host that runs on an NPU, whose own kernel is no oracle."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ascend_case import PLATFORM, START, WITH_TRITON
from environment import Environment

pytestmark = pytest.mark.slow

CODE = """
import vllm_ascend.ops.register_custom_ops
import vllm_ascend.ops.triton.triton_utils as triton_utils
from ascend_patch import _runtime
from ascend_patch.kernels import dispatch, rope
triton_utils._NUM_VECTORCORE = 3
OPERATOR = torch.ops.vllm.npu_rotary_embedding.default
runtime = _runtime.current()

def call(rotary_dim):
    '''The operator's query, and ours without a seam.'''
    generator = torch.Generator().manual_seed(SEED)
    positions = torch.randint(0, 64, (7,), generator=generator)
    q, k = torch.randn(7, 3 * 192, generator=generator), torch.randn(7, 192, generator=generator)
    angles = torch.outer(torch.arange(64.0), 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim))
    cache = torch.cat((angles.cos(), angles.sin()), 1)
    right, _ = rope.rotary_embedding(positions, q, k, cache, head_size=192, is_neox_style=True)
    sizes = 192, rotary_dim, True
    got, _ = OPERATOR.redispatch(NPU, positions, q.clone(), k.clone(), cache, *sizes)
    return got.view_as(right), right

def far(rotary_dim):
    got, right = call(rotary_dim)
    return float((got - right).abs().max())

def break_kernel():
    real = dispatch.candidates("rotary_embedding", "cpu")[0]
    def run(out, *rest):
        real.run(out, *rest)
        out[0, 0] += 1
    dispatch.register("rotary_embedding", "cpu", dispatch.Implementation("fast", run, priority=10))

def said():
    import ascend_patch
    found = ascend_patch.status()
    patch = next(p for p in found["patches"] if p["id"] == "rotary")
    return {"state": patch["state"], "reason": patch["reason"], **found["verification"],
            "test": found["self_tests"].get("rotary", "")}
"""


@pytest.fixture(scope="module", params=["0.18.0", "0.23.0"])
def ascend(request) -> Environment:
    environment = Environment(request.param)
    environment.build()
    return environment


def run(ascend: Environment, seed: int, code: str, **variables: str) -> Any:
    source = f"SEED = {seed}\n{START}{WITH_TRITON}{PLATFORM}{CODE}\n{code}"
    printed = ascend.run(source, patches="all", **variables)
    return json.loads(printed.strip().splitlines()[-1])


VERIFY = {"ASCEND_PATCHES_VERIFY": "rotary"}


def test_ours_is_compared_with_its_reference_where_the_release_is_wrong(ascend, seed):
    code = """
with runtime.verification.step():
    apart = [far(96), far(192), far(64)]
print(json.dumps([apart, said()]))
"""
    apart, found = run(ascend, seed, code, **VERIFY)
    assert max(apart) < 1e-5
    assert found["state"] == "applied", found["reason"]
    assert found["rotary"]["compared"] == 3
    assert found["rotary"]["where"].startswith("vllm::npu_rotary_embedding, call ")
    assert found["rotary"]["notes"] == []


def test_a_kernel_that_goes_wrong_gives_way_to_the_release_s_own(ascend, seed):
    code = """
before = far(96)
break_kernel()
with runtime.verification.step():
    got, _ = call(96)
inside = said()
after, _ = call(96)
print(json.dumps([before, bool(torch.equal(got, after)), inside, said()]))
"""
    before, same, inside, after = run(ascend, seed, code, **VERIFY)
    assert before < 1e-5
    # In the call that found it, and when the operator had been given back.
    assert same
    for found in (inside, after):
        assert found["state"] == "failed"
        assert found["reason"].startswith("verification: vllm::npu_rotary_embedding, call 1: ")


LOAD = """
class Layer(torch.nn.Module):
    head_size, is_neox_style, dtype = 192, True, torch.float32
    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 1e4 ** -(torch.arange(0, 96, 2) / 96))
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), 1))
    def forward(self, positions, query, key):
        return OPERATOR.redispatch(NPU, positions, query, key, self.cos_sin_cache, 192, 96, True)

attention = torch.nn.Module()
attention.num_heads, attention.num_kv_heads, attention.rotary_emb = 3, 1, Layer()
"""


def test_a_model_is_tested_when_it_is_loaded(ascend, seed):
    """The layer as a whole too: the release's sines are wrong at 96, and ours is not held to it."""
    code = f"""{LOAD}
runtime.model_is_loaded(torch.nn.Sequential(attention))
print(json.dumps(said()))
"""
    found = run(ascend, seed, code, ASCEND_PATCHES_SELFTEST="1")
    assert found["state"] == "applied", found["reason"]
    assert found["test"].startswith("4 cases, 99.9 % within "), found


def test_a_wrong_kernel_is_withdrawn_when_a_model_is_loaded(ascend, seed):
    code = f"""{LOAD}
break_kernel()
runtime.model_is_loaded(torch.nn.Sequential(attention))
print(json.dumps([said(), far(96)]))
"""
    found, apart = run(ascend, seed, code, ASCEND_PATCHES_SELFTEST="1")
    assert found["state"] == "applied"
    assert "no longer used: rotary_embedding by fast on cpu" in found["test"]
    assert apart < 1e-5

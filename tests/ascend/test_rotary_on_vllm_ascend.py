"""patch_rotary on the host that runs on an NPU: vllm-ascend's own operator and kernel."""

from __future__ import annotations

import json

import pytest
from environment import Environment

pytestmark = pytest.mark.slow

# The release's Triton kernel runs on CPU tensors in Triton's interpreter; CUDA_VISIBLE_DEVICES=""
# is vLLM's own way to have Triton without a driver. The three language extensions are Ascend's,
# looked up at import and not used by RoPE.
WITH_TRITON = """
import os
os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
import triton.language
for name in ("insert_slice", "extract_slice", "get_element"):
    setattr(triton.language, name, lambda *_, **__: None)
"""

START = """
import json, numpy, sys, torch, torch_npu, vllm
from vllm.platforms import current_platform
assert type(current_platform).__name__ == "NPUPlatform", current_platform
import vllm_ascend.ops.register_custom_ops
import vllm_ascend.ops.rotary_embedding as module
import vllm_ascend.ops.triton.triton_utils as triton_utils
triton_utils._NUM_VECTORCORE = 3
# The operator has a kernel for NPU tensors only; redispatch takes CPU tensors to it.
NPU = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
OPERATOR = torch.ops.vllm.npu_rotary_embedding.default

def error(rotary_dim, head_size=192, heads=3, kv_heads=1, tokens=7, neox=True):
    'The largest error against complex rotation in float64.'
    generator = torch.Generator().manual_seed(SEED)
    positions = torch.randint(0, 64, (tokens,), generator=generator)
    q = torch.randn(tokens, heads * head_size, generator=generator)
    k = torch.randn(tokens, kv_heads * head_size, generator=generator)
    angles = numpy.arange(64)[:, None] / 10000 ** (numpy.arange(0, rotary_dim, 2) / rotary_dim)
    cache = torch.from_numpy(numpy.concatenate([numpy.cos(angles), numpy.sin(angles)], -1)).float()
    expected = []
    for x in (q, k):
        x = x.double().numpy().reshape(tokens, -1, head_size).copy()
        half = rotary_dim // 2
        halves = numpy.s_[:half], numpy.s_[half:rotary_dim]
        first, second = halves if neox else (numpy.s_[:rotary_dim:2], numpy.s_[1:rotary_dim:2])
        turned = (x[..., first] + 1j * x[..., second]) * numpy.exp(
            1j * angles[positions.numpy()])[:, None]
        x[..., first], x[..., second] = turned.real, turned.imag
        expected.append(x)
    sizes = head_size, rotary_dim, neox
    got = OPERATOR.redispatch(NPU, positions, q.clone(), k.clone(), cache, *sizes)
    pairs = [(g.double().numpy().reshape(e.shape), e) for g, e in zip(got, expected)]
    return max(float(numpy.abs(g - e).max()) for g, e in pairs)

def rotary():
    import ascend_patch
    return next(p for p in ascend_patch.status()["patches"] if p["id"] == "rotary")
"""

WRONG = (96, 192)
RIGHT = (64, 128)


@pytest.fixture(scope="module", params=["0.18.0", "0.23.0"])
def ascend(request) -> Environment:
    environment = Environment(request.param)
    environment.build()
    return environment


def run(ascend: Environment, seed: int, code: str, *, patches: str, triton: bool = True) -> object:
    source = f"SEED = {seed}\n{WITH_TRITON if triton else ''}{START}\n{code}"
    return json.loads(ascend.run(source, patches=patches).strip().splitlines()[-1])


MEASURE = f"""
print(json.dumps({{f"{{n}}{{'' if neox else ' gptj'}}": error(n, neox=neox)
                  for n in {RIGHT + WRONG} for neox in (True, False)}}))
"""


def test_the_release_is_wrong_where_rotary_dim_is_no_power_of_two(ascend, seed):
    found = run(ascend, seed, MEASURE, patches="none")
    assert all(found[f"{n}{style}"] < 1e-5 for n in RIGHT for style in ("", " gptj")), found
    assert all(found[f"{n}{style}"] > 0.1 for n in WRONG for style in ("", " gptj")), found


def test_patched_it_is_right_everywhere(ascend, seed):
    found = run(ascend, seed, MEASURE, patches="all")
    assert max(found.values()) < 1e-5, found


def test_only_the_wrong_cases_reach_our_kernel(ascend, seed):
    code = """
before = rotary()
import ascend_patch
for n in (64, 128, 96): error(n)
# More heads, in this style, than the kernel of 0.18.0 compiles for on an NPU.
assert error(128, head_size=128, heads=40, tokens=2, neox=False) < 1e-5
found = ascend_patch.status()
print(json.dumps([before, rotary(), found["kernels"], found["host"]]))
"""
    before, after, kernels, host = run(ascend, seed, code, patches="all")
    assert host == "vllm_ascend"
    assert {t["state"] for t in before["targets"]} == {"applied"}
    counts = {t["id"]: t["calls"] for t in after["targets"] if t["calls"]}
    assert counts == {"vllm::npu_rotary_embedding": 4}
    assert kernels == {"ascend_patch::rotary_embedding": 2 if ascend.release == "0.18.0" else 1}


def test_revert_gives_the_operator_back(ascend, seed):
    code = """
import ascend_patch
patched = error(96)
ascend_patch.revert("rotary")
print(json.dumps([patched, error(96)]))
"""
    patched, reverted = run(ascend, seed, code, patches="all")
    assert patched < 1e-5
    assert reverted > 0.1


def test_the_schema_and_the_fake_stay_the_release_s(ascend, seed):
    code = """
q, k = torch.empty(5, 3 * 192, device="meta"), torch.empty(5, 192, device="meta")
cache, positions = torch.empty(64, 96, device="meta"), torch.empty(5, device="meta").long()
got = OPERATOR(positions, q, k, cache, 192, 96, True)
print(json.dumps([str(OPERATOR._schema), [list(t.shape) for t in got]]))
"""
    unpatched = run(ascend, seed, code, patches="none")
    assert unpatched[1] == [[5, 3 * 192], [5, 192]]
    assert run(ascend, seed, code, patches="all") == unpatched


def test_without_triton_the_release_s_own_code_stays(ascend, seed):
    code = """
calls = []
import torch_npu
module.torch_npu = type("Fake", (), {"_npu_rotary_embedding": staticmethod(
    lambda *a: calls.append(a[3]))})
assert not module.HAS_TRITON
error(96)
import ascend_patch
print(json.dumps([calls, ascend_patch.status()["kernels"]]))
"""
    calls, kernels = run(ascend, seed, code, patches="all", triton=False)
    assert calls == [96]
    assert kernels == {}


def test_no_tokens_and_positions_that_lie_apart(ascend, seed):
    code = """
def outcome(tokens, apart):
    positions = torch.arange(2 * tokens)[::2] if apart else torch.arange(0, 2 * tokens, 2)
    q = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(SEED))
    angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    try:
        got = OPERATOR.redispatch(NPU, positions, q.clone(), q.clone(), cache, 64, 64, True)
    except RuntimeError as error:
        return str(error)[:60]
    return [list(got[0].shape), [x.tolist() for x in got]]
print(json.dumps([outcome(0, False), outcome(5, True), outcome(5, False)]))
"""
    empty, apart, side_by_side = run(ascend, seed, code, patches="none")
    assert "0 elements" in empty
    assert apart != side_by_side
    empty, apart, ours = run(ascend, seed, code, patches="all")
    assert empty == [[0, 192], [[], []]]
    assert ours == side_by_side
    for found, expected in zip(apart[1], side_by_side[1], strict=True):
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5)


def test_explain_names_what_stays(ascend, seed):
    code = """
import ascend_patch._explain
print(json.dumps(ascend_patch._explain.explain_text("rotary").splitlines()))
"""
    lines = run(ascend, seed, code, patches="all")
    untouched = " ".join(lines[lines.index("  left as it is:") :])
    for name in ("DeepSeek", "GLM-5", "Kimi", "MLA", "SFA", "MiniMax", "310P"):
        assert name in untouched, untouched

"""patch_rotary and the fused operators of vllm-ascend 0.18.0 and 0.23.0: the release's own kernels.

What can go wrong on an NPU and not here is modelled where a test says so: `late` lets the scalar
read of a position see the tile of an iteration before.
"""

from __future__ import annotations

import pytest
from ascend_case import Host, run

pytestmark = pytest.mark.slow

OPERATORS = """
import hashlib
import vllm_ascend.ops.register_custom_ops, vllm_ascend.ops
import vllm_ascend.ops.triton.triton_utils as triton_utils
triton_utils._NUM_VECTORCORE = 3
FUSED = torch.ops.vllm.qkv_rmsnorm_rope.default
BY_AXIS = torch.ops.vllm.triton_split_qkv_rmsnorm_mrope.default
ROPE = torch.ops.vllm.npu_rotary_embedding.default
# What calls the operators by name finds the NPU kernels with CPU tensors too.
library = torch.library.Library("vllm", "IMPL")
for operator in (FUSED, BY_AXIS, ROPE):
    kernel = functools.partial(operator.redispatch, NPU)
    library.impl(operator._schema.name.partition("::")[2], kernel, "CPU")
EPS = 1e-6

def inputs(tokens, heads, size, width, dtype, rows=64, gate=False):
    generator = torch.Generator().manual_seed(SEED)
    randn = functools.partial(torch.randn, generator=generator)
    blocks = heads[0] * (2 if gate else 1) + 2 * heads[1]
    qkv = randn(tokens, blocks * size).to(dtype)
    weights = tuple((randn(size) * 0.1 + 1).to(dtype) for _ in "qk")
    biases = tuple(randn(size).to(dtype) for _ in "qk")
    positions = torch.randint(0, rows, (3, tokens), generator=generator)
    return qkv, weights, biases, rotary_oracle.cache(rows, width, dtype), positions

def strided(x):
    'The same values, in rows that are further apart than they are wide.'
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]

def fused(tokens=7, heads=(4, 2), size=128, width=128, dtype=torch.bfloat16, bias="", spread="",
          cache_dtype=None, late=False):
    'The largest error of q, k and v of vllm::qkv_rmsnorm_rope, in units of the dtype.'
    qkv, weights, biases, cache, positions = inputs(tokens, heads, size, width, dtype)
    cache, positions = cache.to(cache_dtype or dtype), positions[0].contiguous()
    biases = tuple(b if name in bias else None for name, b in zip("qk", biases))
    turns = rotary_oracle.turns_of(cache[positions])
    expected = rotary_oracle.split_normalise_rotate(
        qkv, turns, weights, biases, heads, size, EPS)
    if spread == "qkv":
        qkv = strided(qkv)
    if spread == "positions":
        positions = positions.repeat_interleave(2)[::2]
    ascend_triton.READS_LATE = late
    got = FUSED.redispatch(NPU, qkv, cache, positions, *weights, heads[0] * size, heads[1] * size,
                           size, EPS, *biases)
    return found(got, expected)

def by_axis(tokens=7, heads=(4, 2), size=128, width=128, dtype=torch.bfloat16, bias="", text=False,
            section=(24, 20, 20), interleaved=True, gate=False, spread="", say_width=True):
    'The same of vllm::triton_split_qkv_rmsnorm_mrope, and of its gate.'
    qkv, weights, biases, cache, positions = inputs(tokens, heads, size, width, dtype, gate=gate)
    biases = tuple(b if name in bias else None for name, b in zip("qk", biases))
    rows = cache[positions[0] if text else positions]
    turns = rotary_oracle.turns_of(rows)
    turns = turns if text else rotary_oracle.by_axis(turns, list(section), interleaved)
    expected = rotary_oracle.split_normalise_rotate(
        qkv, turns, weights, biases, heads, size, EPS, gate)
    # What lies behind the angles of text is not theirs.
    rows = torch.cat((rows, torch.full_like(rows, 7.0), torch.full_like(rows, 7.0)))[:len(rows)]
    if spread == "qkv":
        qkv = strided(qkv)
    got = BY_AXIS.redispatch(NPU, qkv, *weights, rows, *heads, size, EPS, list(section),
                             interleaved, width if say_width else None, *biases, gate)
    assert gate or got[3].shape == (tokens, 0), got[3].shape
    return found(got if gate else got[:3], expected)

def found(got, expected):
    'The errors, and a digest of the bits.'
    bits = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in got)
    errors = [rotary_oracle.error(g, e) for g, e in zip(got, expected, strict=True)]
    return [*errors, hashlib.sha256(bits).hexdigest()[:16]]
"""

# Where the release is right: a call, as keyword arguments.
FUSED_RIGHT = {
    "one token": "tokens=1",
    "no token": "tokens=0",
    "Qwen3": "heads=(12, 1)",
    "biases": "bias='qk'",
    "part of a head": "width=64",
    "part, 96 of 192": "size=192, width=96, heads=(5, 5)",
    "head of 80": "size=80, width=80, heads=(3, 1)",
    "a full tile a core": "tokens=12, heads=(12, 1)",
}
FUSED_WRONG = {
    "float16": "dtype=torch.float16",
    "float32": "dtype=torch.float32",
    "a bias for k only": "bias='k'",
    "rows apart": "spread='qkv'",
    "positions apart": "spread='positions'",
    "read late": "tokens=40, heads=(12, 1), late=True",
}
AXIS_RIGHT = {
    "Qwen3-VL": "tokens=20, heads=(12, 1)",
    "in chunks": "section=(16, 24, 24), interleaved=False",
    "Qwen3.5": "size=256, width=64, section=(11, 11, 10), gate=True",
    "96 of 192": "size=192, width=96, heads=(3, 1), section=(16, 16, 16), interleaved=False",
    "head of 80": "size=80, width=80, heads=(5, 5), section=(20, 10, 10)",
    "float16": "dtype=torch.float16",
    "float32": "dtype=torch.float32",
    "biases": "bias='qk'",
    "one token": "tokens=1",
    "no token": "tokens=0",
}
AXIS_WRONG = {
    "text": "text=True",
    "text, in chunks": "text=True, section=(16, 24, 24), interleaved=False",
    "text, with a gate": "text=True, size=256, width=64, section=(11, 11, 10), gate=True",
    "a bias for k only": "bias='k'",
    "rows apart": "spread='qkv'",
    "no word of the width": "width=64, section=(12, 10, 10), say_width=False",
}


def measure(function: str, cases: dict[str, str]) -> str:
    entries = ", ".join(f"{name!r}: {function}({call})" for name, call in cases.items())
    return f"{OPERATORS}\nprint(json.dumps({{{entries}}}))"


@pytest.fixture(scope="module", params=["0.18.0", "0.23.0"])
def ascend(request) -> Host:
    return Host(request.param)


# In units of the dtype: the release rounds the normalised head, each product and the sum.
RELEASE, OURS = 4.0, 0.6
# For each of them, float32 arithmetic is one more rounding at every step.
LIMITS = {"read late": RELEASE, "float32": 10.0}


def errors(measured: list) -> list[float]:
    return measured[:-1]


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [("fused", FUSED_RIGHT, FUSED_WRONG), ("by_axis", AXIS_RIGHT, AXIS_WRONG)],
)
def test_ours_is_right_where_the_release_is_wrong_and_nowhere_else(
    ascend, seed, function, right, wrong
):
    code = measure(function, {**right, **wrong})
    release = run(ascend, seed, code, patches="none")
    assert all(max(errors(release[name])) < RELEASE for name in right), release
    assert all(max(errors(release[name])) > 1.5 * RELEASE for name in wrong), release
    patched = run(ascend, seed, code, patches="all")
    assert {name: patched[name] for name in right} == {name: release[name] for name in right}
    late = {name: max(errors(patched[name])) for name in wrong}
    assert all(error < LIMITS.get(name, OURS) for name, error in late.items()), late


def test_calls_go_where_they_are_right(ascend, seed):
    """A second tile of tokens goes to the host's operators, one by one: ours is not needed."""
    code = f"""{OPERATORS}
rows = []
for call in ("tokens=12", "tokens=13", "dtype=torch.float16"):
    npu_operators.used.clear()
    eval(f"fused({{call}}, heads=(12, 1))")
    rows.append([kernels(), list(npu_operators.used)])
by_axis()
by_axis(text=True)
print(json.dumps([rows, kernels(), calls()]))
"""
    (tile, tiles, half), after, calls = run(ascend, seed, code, patches="all")
    assert tile == [{}, []]
    assert tiles == [{}, ["npu_rms_norm"] * 2]
    assert half == [{"ascend_patch::split_qkv_rmsnorm_rope": 1}, []]
    assert after == {"ascend_patch::split_qkv_rmsnorm_rope": 2}
    assert calls == {
        "qkv_rmsnorm_rope": 3,
        "triton_split_qkv_rmsnorm_mrope": 2,
        "npu_rotary_embedding": 1,
    }


def test_revert_gives_the_operators_back(ascend, seed):
    code = f"""{OPERATORS}
import ascend_patch
patched = fused(dtype=torch.float16)[0], by_axis(text=True)[0]
ascend_patch.revert("rotary")
print(json.dumps([patched, [fused(dtype=torch.float16)[0], by_axis(text=True)[0]]]))
"""
    patched, reverted = run(ascend, seed, code, patches="all")
    assert max(patched) < OURS
    assert min(reverted) > 1.5 * RELEASE


def test_the_schemas_and_fakes_stay_the_release_s(ascend, seed):
    code = f"""{OPERATORS}
def shapes(results):
    return [[list(x.shape), str(x.dtype)] for x in results]

meta = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
qkv, weight, positions = meta(5, 1024), meta(128), meta(5, dtype=torch.int64)
fused = FUSED(qkv, meta(64, 128), positions, weight, weight, 512, 256, 128, EPS)
axis = BY_AXIS(qkv, weight, weight, meta(3, 5, 128), 4, 2, 128, EPS, [24, 20, 20], True)
print(json.dumps([[str(op._schema) for op in (FUSED, BY_AXIS)], shapes(fused), shapes(axis)]))
"""
    unpatched = run(ascend, seed, code, patches="none")
    assert [shape for shape, _ in unpatched[1]] == [[5, 512], [5, 256], [5, 256]]
    assert run(ascend, seed, code, patches="all") == unpatched


def test_compiled_is_eager(ascend, seed):
    """What Dynamo and functionalisation make of a call runs the same code, to the bit."""
    code = f"""{OPERATORS}
def attention(qkv, cache, positions, weights):
    q, k, v = torch.ops.vllm.qkv_rmsnorm_rope(
        qkv, cache, positions, *weights, 512, 256, 128, EPS)
    return q + 1, k + 1, v

def by_text(qkv, cache, positions, weights):
    q, k, v, _ = torch.ops.vllm.triton_split_qkv_rmsnorm_mrope(
        qkv, *weights, cache[positions], 4, 2, 128, EPS, [24, 20, 20], True)
    return q + 1, k + 1, v

equal = []
for dtype in (torch.bfloat16, torch.float16):
    for function in (attention, by_text):
        qkv, weights, _, cache, positions = inputs(9, (4, 2), 128, 128, dtype)
        call = qkv, cache, positions[0].contiguous(), weights
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        equal.append(all(map(torch.equal, function(*call), compiled(*call))))
print(json.dumps([equal, kernels()]))
"""
    equal, kernels = run(ascend, seed, code, patches="all")
    assert equal == [True] * 4
    assert kernels == {"ascend_patch::split_qkv_rmsnorm_rope": 6}

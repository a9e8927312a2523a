"""patch_rotary and vllm-ascend's layers: other styles, other angles, and layers without keys."""

from __future__ import annotations

import pytest
from ascend_case import run
from environment import Environment

pytestmark = pytest.mark.slow

LAYERS = """
import contextlib, types
import vllm.forward_context
import vllm_ascend.ops.rotary_embedding as module
from vllm.config import VllmConfig, set_current_vllm_config
import vllm_ascend.ops.register_custom_ops
import vllm_ascend.ops.triton.triton_utils as triton_utils
triton_utils._NUM_VECTORCORE = 3
BASE, ROWS = 10000.0, 64
ROPE = getattr(torch.ops.vllm, "npu_rotary_embedding", None)
if ROPE is not None:
    library = torch.library.Library("vllm", "IMPL")
    library.impl("npu_rotary_embedding", functools.partial(ROPE.default.redispatch, NPU), "CPU")
context = types.SimpleNamespace(is_draft_model=False, flash_comm_v1_enabled=False)
vllm.forward_context._forward_context = context

import vllm.model_executor.custom_op as custom_op
custom_op.CustomOp.dispatch_forward = lambda self, *_, **__: self.forward_oot

def make(cls, *args, **kwargs):
    with set_current_vllm_config(CONFIG):
        return cls(*args, **kwargs)

CONFIG = VllmConfig()

def randn(*shape, dtype=torch.float32, offset=0):
    generator = torch.Generator().manual_seed(SEED + offset)
    return torch.randn(*shape, generator=generator).to(dtype)

def positions(*shape):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(SEED + 7))

def outcome(call, expected):
    'The error of what it returns, or what it raised.'
    try:
        got = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:90]
    got = got if isinstance(got, tuple) else (got,)
    errors = [rotary_oracle.error(g, e) for g, e in zip(got, expected) if g is not None]
    return max(errors)

def angles(shape=(4, 7, 3, 64), width=64, neox=True, spread=(), fp32=False, dtype=torch.float32):
    'AscendApplyRotaryEmb on x of that shape, by angles of [*spread, s, width / 2].'
    layer = make(module.AscendApplyRotaryEmb, is_neox_style=neox, enable_fp32_compute=fp32)
    rows = rotary_oracle.cache(ROWS, width, dtype)[positions(*spread, shape[-3])]
    cos, sin = rows.chunk(2, -1)
    x = randn(*shape, dtype=dtype)
    turns = rotary_oracle.turns_of(rows)[..., None, :]
    expected = rotary_oracle.rotate(x.double().numpy(), turns, neox)
    return outcome(lambda: layer.forward_oot(x, cos, sin), [expected])

def sections(section=(16, 24, 24), interleaved=False, neox=True, text=False, size=128,
             triton=True, dtype=torch.float32):
    'AscendMRotaryEmbedding, with and without what the release looks for in Triton.'
    width = 2 * sum(section)
    layer = make(module.AscendMRotaryEmbedding, size, width, ROWS, BASE, neox, dtype,
                 mrope_section=list(section), mrope_interleaved=interleaved)
    rows = positions(9) if text else positions(3, 9)
    q, k = randn(9, 3 * size, dtype=dtype), randn(9, size, dtype=dtype, offset=1)
    turns = rotary_oracle.turns_of(rotary_oracle.cache(ROWS, width, dtype)[rows])
    turns = turns if text else rotary_oracle.by_axis(turns, list(section), interleaved)
    expected = [rotary_oracle.rotate(x.double().numpy().reshape(9, -1, size), turns[:, None], neox)
                for x in (q, k)]
    return outcome(lambda: layer.forward_oot(rows, q.clone(), k.clone()), expected)

def queries(size=64, width=64, neox=True, override=None, cls="AscendRotaryEmbedding", rows=None,
            **more):
    'A layer without keys.'
    scaling = (4.0,) if "YaRN" in cls else ()
    layer = make(getattr(module, cls), size, width, ROWS, BASE, neox, *scaling, torch.float32)
    rows = positions(9) if rows is None else rows
    q = randn(9, 3 * size)
    turns = rotary_oracle.turns_of(layer.cos_sin_cache[rows])[:, None]
    style = neox if override is None else override
    expected = rotary_oracle.rotate(q.double().numpy().reshape(9, -1, size), turns, style)
    given = more.get("given", rows)
    return outcome(lambda: layer.forward_oot(given, q.clone(), None, None, override), [expected])
"""

# A call of the release that is right with all of them, and where one is wrong in which releases.
ANGLES_RIGHT = {
    "q and k in a batch": "",
    "one image": "shape=(7, 3, 64)",
    "in float32": "fp32=True, dtype=torch.bfloat16",
    "bfloat16": "dtype=torch.bfloat16",
    "angles with a batch of one": "spread=(1,)",
}
ANGLES_WRONG = {
    "GPT-J": "neox=False",
    "GPT-J, one image": "neox=False, shape=(7, 3, 64)",
    "part of a head": "width=32",
    "part of a head, two tokens": "width=32, shape=(2, 2, 3, 64)",
    "angles for each of a batch": "spread=(4,)",
    "a batch of 1000": "shape=(1000, 2, 1, 8), width=8",
}
SECTIONS_RIGHT = {
    "Qwen2.5-VL": "",
    "Qwen3-VL": "section=(24, 20, 20), interleaved=True",
    "text": "text=True",
    "text, interleaved": "text=True, section=(24, 20, 20), interleaved=True",
    "GLM-4.1V, by torch": "section=(8, 12, 12), neox=False",
}
SECTIONS_WRONG = {
    "GPT-J by npu_mrope": "neox=False",
    "GPT-J by npu_mrope, text": "neox=False, text=True",
    "GPT-J by Triton": "section=(24, 20, 20), interleaved=True, neox=False",
}
QUERIES_WRONG = {
    "NeoX": "",
    "GPT-J": "neox=False",
    "GPT-J for once": "override=False",
    "part of a head": "size=128, width=64",
    "whole heads of 128": "size=128, width=128",
    "YaRN": "cls='AscendYaRNRotaryEmbedding'",
}


def measure(function: str, cases: dict[str, str]) -> str:
    entries = ", ".join(f"{name!r}: {function}({call})" for name, call in cases.items())
    return f"{LAYERS}\nprint(json.dumps([{{{entries}}}, npu_operators.used, kernels()]))"


@pytest.fixture(scope="module", params=["0.13.0", "0.18.0", "0.23.0"])
def ascend(request) -> Environment:
    environment = Environment(request.param)
    environment.build()
    return environment


# In units of the dtype. float32 rounds each product and the sum.
RIGHT, WRONG = 8.0, 1000.0


def is_right(found: float | str) -> bool:
    return isinstance(found, float) and found < RIGHT


def is_wrong(found: float | str) -> bool:
    """It raises, or rotates by something else."""
    return isinstance(found, str) or found > WRONG


def both(ascend, seed, function, cases):
    code = measure(function, cases)
    return run(ascend, seed, code, patches="none"), run(ascend, seed, code, patches="all")


def test_given_angles(ascend, seed):
    wrong, right = dict(ANGLES_WRONG), dict(ANGLES_RIGHT)
    odd = {"q alone": "shape=(1, 7, 3, 64)", "an odd batch": "shape=(3, 7, 3, 64)"}
    # 0.13.0 halves every batch into q and k.
    (wrong if ascend.release == "0.13.0" else right).update(odd)
    (release, _, _), (patched, used, kernels) = both(ascend, seed, "angles", {**right, **wrong})
    assert all(is_right(release[name]) for name in right), release
    assert all(is_wrong(release[name]) for name in wrong), release
    assert all(is_right(found) for found in patched.values()), patched
    # The operator stays where it is right, and 0.13.0's q alone goes to it without its batch.
    halves = {"q and k in a batch", "in float32", "bfloat16", "angles with a batch of one"}
    doubled = len(halves) if ascend.release == "0.13.0" else 0
    kept = len(right) + doubled + ("q alone" in wrong)
    assert used == ["npu_rotary_mul"] * kept
    assert kernels == {"ascend_patch::apply_rotary": len(wrong) - ("q alone" in wrong)}


def test_sections(ascend, seed):
    cases = {**SECTIONS_RIGHT, **SECTIONS_WRONG}
    (release, _, _), (patched, used, kernels) = both(ascend, seed, "sections", cases)
    assert all(is_right(release[name]) for name in SECTIONS_RIGHT), release
    assert all(is_wrong(release[name]) for name in SECTIONS_WRONG), release
    assert all(is_right(found) for found in patched.values()), patched
    assert used == ["npu_mrope"] * 2
    assert kernels == {"ascend_patch::rotary_embedding": len(SECTIONS_WRONG)}


def test_interleaved_sections_without_triton(ascend, seed):
    """npu_mrope is asked for three chunks, whatever the layer wants."""
    code = measure("sections", {"interleaved": "interleaved=True"})
    found = [run(ascend, seed, code, patches=p, triton=False)[0] for p in ("none", "all")]
    assert is_wrong(found[0]["interleaved"])
    assert is_right(found[1]["interleaved"])


def test_layers_without_keys(ascend, seed):
    (release, _, _), (patched, _, kernels) = both(ascend, seed, "queries", QUERIES_WRONG)
    assert all(isinstance(found, str) for found in release.values()), release
    assert all(is_right(found) for found in patched.values()), patched
    assert kernels == {"ascend_patch::rotary_embedding": len(QUERIES_WRONG)}

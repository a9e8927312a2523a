"""patch_rotary and vllm-ascend's layers: other styles, other angles, and layers without keys."""

from __future__ import annotations

import os
import secrets
from typing import Any

import pytest
from ascend_case import Host, run

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
library = torch.library.Library("vllm", "IMPL")
for name in ("npu_rotary_embedding", "rope_forward_oot"):
    if hasattr(torch.ops.vllm, name):
        operator = getattr(torch.ops.vllm, name).default
        library.impl(name, functools.partial(operator.redispatch, NPU), "CPU")
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
    turns = rotary_oracle.turns_of(layer.cos_sin_cache[rows])
    turns = turns if text else rotary_oracle.by_axis(turns, list(section), interleaved)
    expected = [rotary_oracle.rotate(x.double().numpy().reshape(9, -1, size), turns[:, None], neox)
                for x in (q, k)]
    return outcome(lambda: layer.forward_oot(rows, q.clone(), k.clone()), expected)

def queries(size=64, width=64, neox=True, override=None, cls="AscendRotaryEmbedding", key=False,
            gathers=False):
    'A layer without keys, or with them.'
    scaling = (4.0,) if "YaRN" in cls else ()
    layer = make(getattr(module, cls), size, width, ROWS, BASE, neox, *scaling, torch.float32)
    rows = positions(9)
    if gathers:
        # A rank's share of the positions; `gather` stands for the other rank's.
        layer.use_mtp, given, rows = True, rows, gather(rows)
    q = randn(len(rows), 3 * size)
    k = randn(len(rows), size, offset=1) if key else None
    turns = rotary_oracle.turns_of(layer.cos_sin_cache[rows])[:, None]
    style = neox if override is None else override
    expected = [rotary_oracle.rotate(x.double().numpy().reshape(len(rows), -1, size), turns, style)
                for x in (q, k) if x is not None]
    call = given if gathers else rows, q.clone(), k if k is None else k.clone(), None, override
    return outcome(lambda: layer.forward_oot(*call), expected)

def gather(rows, *_):
    return torch.cat((rows, (rows + 1) % ROWS))

def group(function, cases):
    'What is found, the operators of torch_npu and the kernels of ours that ran for it.'
    npu_operators.used.clear()
    before = dict(kernels())
    found = {name: eval(f"{function}({call})") for name, call in cases.items()}
    ran = {name: count - before.get(name, 0) for name, count in kernels().items()}
    return [found, list(npu_operators.used), {name: n for name, n in ran.items() if n}]
"""

# A call of the release that is right with all of them, and where one is wrong in which releases.
ANGLES_RIGHT = {
    "q and k in a batch": "",
    "one image": "shape=(7, 3, 64)",
    "in float32": "fp32=True, dtype=torch.bfloat16",
    "bfloat16": "dtype=torch.bfloat16",
    "angles with a batch of one": "spread=(1,)",
}
# 0.13.0 halves every batch into q and k.
ODD = {"q alone": "shape=(1, 7, 3, 64)", "an odd batch": "shape=(3, 7, 3, 64)"}
ANGLES_WRONG = {
    "GPT-J": "neox=False",
    "GPT-J, one image": "neox=False, shape=(7, 3, 64)",
    "part of a head": "width=32",
    "part of a head, two tokens": "width=32, shape=(2, 2, 3, 64)",
    "angles for each of a batch": "spread=(4,)",
    "a batch of 2000": "shape=(2000, 2, 1, 8), width=8",
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


DRAFTS = {
    "YaRN in a draft": "cls='AscendYaRNRotaryEmbedding', key=True",
    "without keys": "",
}
GROUPS = {
    "angles": {**ANGLES_RIGHT, **ODD, **ANGLES_WRONG},
    "sections": {**SECTIONS_RIGHT, **SECTIONS_WRONG},
    "queries": QUERIES_WRONG,
}
MEASURE = f"""{LAYERS}
found = {{name: group(name, cases) for name, cases in {GROUPS!r}.items()}}
context.is_draft_model = True
found["drafts"] = group("queries", {DRAFTS!r})
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["0.13.0", "releases/v0.13.0", "0.18.0", "0.23.0"])
def ascend(request) -> Host:
    return Host(request.param)


@pytest.fixture(scope="module")
def release(ascend) -> dict[str, Any]:
    """What the release makes of every case."""
    return run(ascend, SEED, MEASURE, patches="none")


@pytest.fixture(scope="module")
def patched(ascend) -> dict[str, Any]:
    return run(ascend, SEED, MEASURE, patches="all")


# One for the module: several tests look at what one process has measured.
SEED = int(os.environ.get("ASCEND_PATCH_SEED") or secrets.randbelow(2**31))
# In units of the dtype. float32 rounds each product and the sum.
RIGHT, WRONG = 8.0, 1000.0


def is_right(found: float | str) -> bool:
    return isinstance(found, float) and found < RIGHT


def is_wrong(found: float | str) -> bool:
    """It raises, or rotates by something else."""
    return isinstance(found, str) or found > WRONG


def test_given_angles(ascend, release, patched):
    wrong, right = dict(ANGLES_WRONG), dict(ANGLES_RIGHT)
    halves = ascend.release == "0.13.0"
    (wrong if halves else right).update(ODD)
    found, _, _ = release["angles"]
    assert all(is_right(found[name]) for name in right), found
    assert all(is_wrong(found[name]) for name in wrong), found
    ours, still_used, kernels = patched["angles"]
    assert all(is_right(error) for error in ours.values()), ours
    assert {name: ours[name] for name in right} == {name: found[name] for name in right}
    # The operator stays where it is right; 0.13.0's q alone goes to it without its batch.
    batches = sum("shape=(7" not in call for call in right.values())
    once = len(right) + (batches + 1 if halves else 0)
    assert still_used == ["npu_rotary_mul"] * once
    assert kernels == {"ascend_patch::apply_rotary": len(wrong) - halves}


def test_sections(release, patched):
    found, _, _ = release["sections"]
    assert all(is_right(found[name]) for name in SECTIONS_RIGHT), found
    assert all(is_wrong(found[name]) for name in SECTIONS_WRONG), found
    ours, used, kernels = patched["sections"]
    assert all(is_right(error) for error in ours.values()), ours
    assert used == ["npu_mrope"] * 2
    assert kernels == {"ascend_patch::rotary_embedding": len(SECTIONS_WRONG)}


def test_layers_without_keys(release, patched):
    found, _, _ = release["queries"]
    assert all(isinstance(error, str) for error in found.values()), found
    ours, _, kernels = patched["queries"]
    assert all(is_right(error) for error in ours.values()), ours
    assert kernels == {"ascend_patch::rotary_embedding": len(QUERIES_WRONG)}


def test_draft_models(ascend, release, patched):
    found, _, _ = release["drafts"]
    misses = "has no attribute 'use_mtp'" in str(found["YaRN in a draft"])
    assert misses == (ascend.release == "0.18.0"), found
    assert all(is_right(error) for error in patched["drafts"][0].values()), patched["drafts"]


def test_compiled_is_eager_and_revert_gives_the_layers_back(ascend):
    """Ours, and what stays the release's, through Dynamo and functionalisation."""
    code = f"""{LAYERS}
def equal(layer, *call):
    torch.compiler.reset()
    compiled = torch.compile(layer.forward_oot, backend="aot_eager", fullgraph=True)
    pairs = [[x for x in (got if isinstance(got, tuple) else (got,)) if x is not None]
             for got in (layer.forward_oot(*call), compiled(*call))]
    return all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))

cos, sin = rotary_oracle.cache(ROWS, 64, torch.float32)[positions(7)].chunk(2, -1)
found = []
for neox in (True, False):
    layer = make(module.AscendApplyRotaryEmb, is_neox_style=neox)
    found.append(equal(layer, randn(4, 7, 3, 64), cos, sin))
    layer = make(module.AscendMRotaryEmbedding, 128, 128, ROWS, BASE, neox, torch.float32,
                 mrope_section=[16, 24, 24])
    found.append(equal(layer, positions(3, 9), randn(9, 384), randn(9, 128)))
    layer = make(module.AscendRotaryEmbedding, 64, 64, ROWS, BASE, neox, torch.float32)
    found.append(equal(layer, positions(9), randn(9, 192), None))
cases = "neox=False", "neox=False", ""
def measured():
    return [angles(neox=False), sections(neox=False), queries()]
ours = measured()
import ascend_patch
ascend_patch.revert("rotary")
print(json.dumps([found, ours, measured(), calls()]))
"""
    equal, ours, reverted, counts = run(ascend, SEED, code, patches="all")
    assert equal == [True] * 6
    assert all(is_right(error) for error in ours), ours
    assert all(is_wrong(error) for error in reverted), reverted
    assert counts["AscendApplyRotaryEmb.forward_oot"] == 3


def test_what_only_some_releases_have(ascend):
    """npu_mrope without Triton is asked for chunks; flashcomm shares a draft's positions."""
    code = f"""{LAYERS}
import ascend_patch
found = [sections(interleaved=True)]
if hasattr(torch.ops.vllm, "npu_rotary_embedding"):
    library.impl("maybe_all_gather_and_maybe_unpad", gather, "CPU")
    context.is_draft_model = context.flash_comm_v1_enabled = True
    found.append(queries(gathers=True))
    # The release gathers them for a layer with keys, by the same operator.
    found.append(queries(gathers=True, key=True))
context.is_draft_model = context.flash_comm_v1_enabled = False
ascend_patch.revert("rotary")
print(json.dumps([found, sections(interleaved=True)]))
"""
    found, reverted = run(ascend, SEED, code, patches="all", triton=False)
    assert all(is_right(error) for error in found), found
    assert is_wrong(reverted)

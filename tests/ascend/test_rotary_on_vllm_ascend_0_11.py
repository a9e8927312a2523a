"""patch_rotary on vllm-ascend 0.11.0: heads of which a part turns, other styles, missing keys."""

from __future__ import annotations

import pytest
from ascend_case import Host, run

pytestmark = pytest.mark.slow

LAYERS = """
import types, importlib.machinery
# transformers imports it where it is installed; its library need not be, and nothing here uses it.
sound = types.ModuleType("soundfile")
sound.__spec__ = importlib.machinery.ModuleSpec("soundfile", None)
sys.modules["soundfile"] = sound
import vllm_ascend.ops.rotary_embedding as module
import vllm.model_executor.custom_op as custom_op
custom_op.CustomOp.dispatch_forward = lambda self, *_, **__: self.forward_oot
ROWS = 64
# What the release asks at every step; the first layer of a step gathers cosines and sines.
context = types.SimpleNamespace(is_first_layer=True)
module.get_forward_context = lambda: context
# Its own kernel is one of NPUs, for float16.
module.enable_custom_op = lambda: False

def randn(*shape, offset=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(SEED + offset)
    return torch.randn(*shape, generator=generator).to(dtype)

def error(size=128, width=128, neox=True, override=None, key=True, tokens=9, style_first=None,
          section=None, turns=False, text=False, heads=4, dtype=torch.float32):
    'The largest error of q and k in units of the dtype, or what was raised.'
    cls = module.AscendMRotaryEmbedding if section else module.AscendRotaryEmbedding
    more = dict(mrope_section=list(section), mrope_interleaved=turns) if section else {}
    layer = cls(size, width, ROWS, 10000.0, neox, dtype, **more)
    shape = (3, tokens) if section and not text else (tokens,)
    rows = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(SEED + 7))
    q, k = randn(tokens, heads * size, dtype=dtype), randn(tokens, 2 * size, offset=1, dtype=dtype)
    angles = rotary_oracle.turns_of(layer.cos_sin_cache[rows])
    if section and not text:
        angles = rotary_oracle.by_axis(angles, list(section), turns)
    style = neox if override is None else override
    expected = [rotary_oracle.rotate(x.double().numpy().reshape(tokens, x.shape[1] // size, size),
                                     angles[:, None], style) for x in (q, k)]
    context.is_first_layer = True
    call = (rows, q.clone(), k.clone() if key else None)
    try:
        if style_first:
            layer.forward_oot(rows, q.clone(), k.clone())
        got = layer.forward_oot(*call) if section else layer.forward_oot(*call, None, override)
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"[:80]
    return max(rotary_oracle.error(g, e) for g, e in zip(got, expected) if g is not None)
"""

RIGHT = {
    "whole heads": "",
    "heads of 64": "size=64, width=64",
    "heads of 64, GPT-J": "size=64, width=64, neox=False",
    "bfloat16": "dtype=torch.bfloat16",
    "Qwen2.5-VL": "section=(16, 24, 24)",
    "text": "section=(16, 24, 24), text=True",
    "Qwen3-VL, by torch": "section=(24, 20, 20), turns=True",
    # The width that the release gives is not a head's; in NeoX style nobody looks at it.
    "part of a head": "width=64",
    "96 of 192": "size=192, width=96",
}
WRONG = {
    "part of a head, GPT-J": "width=64, neox=False",
    "another style for once": "override=False, style_first=True",
    "no key": "key=False",
    "no key, GPT-J": "key=False, neox=False, width=64",
    "no token": "tokens=0",
    "sections, GPT-J": "section=(16, 24, 24), neox=False",
    "sections, interleaved": "section=(16, 24, 24), turns=True",
}
MEASURE = f"""{LAYERS}
found = {{name: eval(f"error({{call}})") for name, call in { ({**RIGHT, **WRONG})!r}.items()}}
def used():
    return {{name: npu_operators.used.count(name) for name in set(npu_operators.used)}}
"""


@pytest.fixture(scope="module", params=["0.11.0", "v0.11.0-dev"])
def ascend(request) -> Host:
    return Host(request.param)


def is_right(found: float | str) -> bool:
    return isinstance(found, float) and found < 8


def test_ours_is_right_where_the_release_is_wrong_and_nowhere_else(ascend, seed):
    code = f"{MEASURE}\nprint(json.dumps([found, rotary()['reason'], kernels(), used()]))"
    release, *_ = run(ascend, seed, code, patches="none", triton=False)
    assert all(is_right(release[name]) for name in RIGHT), release
    assert not any(is_right(release[name]) for name in WRONG), release
    patched, reason, kernels, used = run(ascend, seed, code, patches="all", triton=False)
    assert ascend.label in reason
    assert all(is_right(found) for found in patched.values()), patched
    assert {name: patched[name] for name in RIGHT} == {name: release[name] for name in RIGHT}
    # Where a part of a head turns, torch_npu's operator still does the work.
    assert kernels == {"ascend_patch::rotary_embedding": len(WRONG) - 1}
    assert used == {"npu_apply_rotary_pos_emb": 3, "_npu_rotary_embedding": 5, "npu_mrope": 2}


def test_compiled_is_eager_and_revert_gives_the_release_back(ascend, seed):
    code = f"""{LAYERS}
equal = []
for width, neox, key in ((64, True, True), (64, False, True), (128, True, False)):
    layer = module.AscendRotaryEmbedding(128, width, ROWS, 10000.0, neox, torch.float32)
    rows = torch.arange(9) % ROWS
    call = rows, randn(9, 512), randn(9, 256, offset=1) if key else None
    def rotate(positions, q, k):
        return module._rope_forward_oot(layer, positions, q, k, neox)
    torch.compiler.reset()
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    copies = [[x.clone() if torch.is_tensor(x) else x for x in call] for _ in range(2)]
    pairs = zip(rotate(*copies[0]), compiled(*copies[1]))
    equal.append(all(a is b is None or torch.equal(a, b) for a, b in pairs))
ours = error(width=64, neox=False)
import ascend_patch
ascend_patch.revert("rotary")
print(json.dumps([equal, ours, error(width=64, neox=False)]))
"""
    equal, ours, reverted = run(ascend, seed, code, patches="all", triton=False)
    assert equal == [True] * 3
    assert is_right(ours)
    assert not is_right(reverted)

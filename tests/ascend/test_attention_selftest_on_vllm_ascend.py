"""patch_attention_router's self-test at load: what an operator really does with a window's edge."""

from __future__ import annotations

from typing import Any

import pytest
from ascend_attention_runs import run

pytestmark = pytest.mark.slow

CODE = """
from ascend_patch import _runtime
from ascend_patch.kernels.npu_ops import surface
runtime = _runtime.current()

def off_by(more):
    'Another operator: its band keeps `more` keys more than it should.'
    library = torch.library.Library("npu", "IMPL")
    for name in ("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"):
        full = f"npu::{name}"
        (schema,) = [s for s in torch._C._jit_get_schemas_for_operator(full)
                     if not s.overload_name]
        real = surface._kernel(operators, full, schema, surface.kernels()[full])
        names = [a.name for a in schema.arguments]
        def wrong(*args, real=real, names=names, **kwargs):
            given = {**dict(zip(names, args)), **kwargs}
            if given.get("sparse_mode") == 4:
                given["pre_tokens"] += more
            return real(**given)
        library.impl(name, wrong, "CPU", allow_override=True)
    return library

def model(**about):
    layer = torch.nn.Module()
    layer.impl = Model(**about).impl
    layer.weight = torch.nn.Parameter(torch.zeros(1))
    return torch.nn.Sequential(layer)

def said(loaded):
    runtime.model_is_loaded(loaded)
    import ascend_patch
    found = ascend_patch.status()["self_tests"]["attention_router"]
    return [router()["state"], router()["reason"], found]

def error(**about):
    batch = Batch(Model(**about, seed=SEED), [140, 0, 130], [1, 41, 9], "ChunkedPrefill")
    return batch.error(batch.forward())
"""

ABOUT = {
    "plain": {"runner": "pooling"},
    "window": {"window": 20},
    "long window": {"window": 600, "heads": 8, "kv_heads": 1},
    "window 256": {"window": 20, "size": 256},
    "encoder": {"window": 20, "runner": "pooling", "attn_type": "encoder_only"},
    "head 64": {"size": 64, "runner": "pooling"},
    "sinks": {"window": 20, "sinks": True, "dtype": "bfloat16"},
}


def outcome(release: str, code: str, seed: int, *, on: str = "1") -> Any:
    found = run(release, f"{CODE}\n{code}", seed=seed, ASCEND_PATCHES_SELFTEST=on)
    print(release, found)
    return found


@pytest.mark.parametrize("release", ["0.13.0", "0.18.0", "0.23.0"])
def test_a_model_s_routes_are_right(release, seed):
    about = {n: a for n, a in ABOUT.items() if not (a.get("sinks") and release == "0.13.0")}
    # The surface refuses the band of 0.23.0's own call for this head size.
    about = {n: a for n, a in about.items() if not (a.get("size") == 256 and release == "0.23.0")}
    code = f"print(json.dumps({{n: said(model(**a)) for n, a in {about!r}.items()}}))"
    found = outcome(release, code, seed)
    for name, (state, reason, sentence) in found.items():
        assert state == "applied", reason
        cases = 1 if name == "encoder" else 3
        assert sentence.startswith(f"{cases} cases, 99.9 % within "), (name, sentence)
        assert "no longer used" not in sentence


@pytest.mark.parametrize(("release", "more"), [("0.18.0", 1), ("0.18.0", -1), ("0.23.0", -1)])
def test_a_band_that_counts_otherwise_is_not_used(release, more, seed):
    code = f"""
before = error(window=20)
library = off_by({more})
first = said(model(window=20))
print(json.dumps([before, first, error(window=20), error(window=30)]))
"""
    before, (state, reason, sentence), after, of_another = outcome(release, code, seed)
    assert before < 1e-4
    assert state == "applied", reason
    assert "no longer used: the route window-cache for heads 4:2 of 128, window 20" in sentence
    if release == "0.23.0":
        # There the release's own number is the right one for such an operator.
        assert after < 1e-4
    else:
        assert after > 0.05
    # A layer that was not in the model was not tried.
    assert of_another > 0.05


def test_without_the_self_test_nothing_is_tried(seed):
    code = """
runtime.model_is_loaded(model(window=20))
import ascend_patch
print(json.dumps([error(window=20), ascend_patch.status()["self_tests"]]))
"""
    error, tests = outcome("0.18.0", code, seed, on="0")
    assert error < 1e-4
    assert tests == {}

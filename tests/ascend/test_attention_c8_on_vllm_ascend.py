"""patch_attention_router and layers with an int8 cache: causal pooling reads it.

The oracle is dense, over the cache as the release wrote it, dequantised in float64; the rounding to
int8 is the release's, and what it costs is asserted beside it.
"""

from __future__ import annotations

import functools

import pytest
from ascend_attention_runs import run, session_seed

pytestmark = pytest.mark.slow

RUNNERS = ("pooling", "generate")
CODE = """
import numpy, types
KIND = "AscendC8AttentionBackendImpl"

def scales(model):
    'Per channel; the largest of 500 normal numbers is within the range of int8.'
    for name in "kv":
        scale = 0.03 + 0.01 * torch.rand(model.kv_heads * model.size, generator=model.random)
        offset = torch.randint(-3, 4, scale.shape, generator=model.random).float()
        if model.dtype == torch.bfloat16:
            offset.zero_()
        setattr(model.layer, f"{name}_cache_scale", torch.nn.Parameter(scale, False))
        setattr(model.layer, f"{name}_cache_offset", torch.nn.Parameter(offset, False))

def parameters(model, name):
    found = (getattr(model.layer, f"{name}_cache_{what}").data for what in ("scale", "offset"))
    return [x.view(model.kv_heads, model.size) for x in found]

def quantised(model, cache, name):
    'What no request owns is full of nonsense here as well.'
    scale, offset = parameters(model, name)
    return (cache.nan_to_num(3.0) / scale + offset).round().clamp(-128, 127).to(torch.int8)

def dequantised(model, cache, name):
    scale, offset = parameters(model, name)
    return ((cache.double() - offset) * scale).numpy().reshape(-1, model.kv_heads, model.size)

def expected(batch, keys, values):
    parts, at = [], 0
    for r, n in enumerate(batch.query_lens):
        query = batch.query[at : at + n].float().numpy()
        parts.append(ascend_attention.ascend_attention_oracle.attention(
            query, keys[r], values[r], scale=batch.model.scale))
        at += n
    return numpy.concatenate(parts)

def far(got, right):
    return float(numpy.abs(got.double().numpy() - right).max())

def outcome(contexts, lens, state, runner, dtype):
    model = Model(runner=runner, kind=KIND, seed=SEED, dtype=dtype)
    scales(model)
    batch = Batch(model, contexts, lens, state)
    batch.cache = [quantised(model, x, name) for x, name in zip(batch.cache, "kv")]
    operators.calls.clear()
    try:
        got = batch.forward()
    except Exception as fault:
        return {"fault": f"{type(fault).__name__}: {fault}"}
    own = [[x.double().numpy() for x in xs] for xs in (batch.keys, batch.values)]
    both = [dequantised(model, x, name) for x, name in zip(batch.cache, "kv")]
    kept = [[x[slots] for slots in batch.places] for x in both]
    # Where no request has a context the release takes this step's keys before they are rounded.
    of_cache = expected(batch, *(kept if any(contexts) else own))
    return {
        "error": far(got, of_cache),
        "against float keys": far(got, expected(batch, *own)),
        "calls": ascend_attention.calls(),
        "runner": batch.metadata().model_runner_type,
        "bits": ascend_attention.digest(got),
    }
"""

# A decode's scales are bfloat16 in the release, which the operator takes with such queries alone.
# They have no offsets here: the operator adds them, and what the release writes has them added.
STEPS = {
    "PrefillCacheHit": ([130, 3], [5, 40], "float32"),
    "ChunkedPrefill": ([130, 3], [5, 40], "float32"),
    "ChunkedPrefill and decode": ([130, 3], [1, 40], "bfloat16"),
    "DecodeOnly": ([130, 30], [1, 1], "bfloat16"),
    "PrefillNoCache": ([0, 0], [50, 7], "float32"),
}
ALL = """
print(json.dumps({
    f"{runner} {name}": outcome(contexts, lens, name.partition(" ")[0], runner, dtype)
    for runner in ("pooling", "generate") for name, (contexts, lens, dtype) in STEPS.items()}))
"""


@functools.cache
def outcomes(patches):
    print(f"repeat with ASCEND_PATCH_SEED={session_seed()}")
    return run("0.18.0", f"STEPS = {STEPS!r}\n{CODE}\n{ALL}", patches=patches)


@pytest.mark.parametrize("name", STEPS)
def test_the_release_passes_int8_keys_on_as_they_are(name):
    found = outcomes("none")[f"pooling {name}"]
    assert "npu_fusion_attention" in found["fault"], found


@pytest.mark.parametrize("name", STEPS)
def test_patched_pooling_goes_the_way_of_generation(name):
    pooling, generate = (outcomes("attention_router")[f"{r} {name}"] for r in RUNNERS)
    print(pooling)
    rounding = 0.02 if STEPS[name][2] == "bfloat16" else 1e-4
    assert pooling["error"] < rounding
    # int8 keys of about 3 sigma in 127 steps.
    assert pooling["against float keys"] < 0.2
    assert {call["operator"] for call in pooling["calls"]} == {"npu_fused_infer_attention_score"}
    # What the builder made is given back as it was.
    assert pooling["runner"] == "pooling"
    assert pooling["calls"] == generate["calls"]
    assert pooling["bits"] == generate["bits"]


@pytest.mark.parametrize("name", STEPS)
def test_generation_is_left_alone(name):
    unpatched, patched = (outcomes(p)[f"generate {name}"] for p in ("none", "attention_router"))
    assert unpatched == patched


REACHED = """
import types
KIND = module.AscendC8AttentionBackendImpl
seen = []

def note(name, result=None):
    def method(self, *args, **kwargs):
        seen.append([name, self.sliding_window])
        return result(*args) if result else args[-2]
    setattr(KIND, name, method)

# Its cache is in a format that is not emulated: what is reached is what is asked.
KIND._prepare_c8_scales = lambda *_: None
KIND._quantize_kv_to_int8 = lambda self, key, value, *_: (key, value)
KIND._reshape_and_cache = KIND.reshape_and_cache = (
    lambda self, query, key, value, cache, metadata, output: (query, key, value, output))
for name in ("_forward_encoder_attention", "forward_impl"):
    note(name, lambda *args: args[0])
for name in ("_forward_c8_decode", "_forward_c8_chunked_prefill",
             "_forward_c8_fused_infer_attention"):
    note(name)

def reached(runner, transfer=None, state="ChunkedPrefill", causal=True):
    model = Model(runner=runner, window=20, kind="AscendC8AttentionBackendImpl")
    model.impl.vllm_config.kv_transfer_config = transfer
    model.impl.is_kv_producer = transfer is not None
    batch = Batch(model, [130, 3], [5, 40], state, causal=causal)
    seen.clear()
    batch.forward()
    return [list(seen), model.impl.sliding_window]

print(json.dumps({
    "pooling": reached("pooling"), "generate": reached("generate"),
    "hit": reached("pooling", state="PrefillCacheHit"),
    "not causal": reached("pooling", causal=False),
    "producer": reached("generate", transfer=types.SimpleNamespace()),
    "pooling producer": reached("pooling", transfer=types.SimpleNamespace()),
}))
"""


def test_0_23_0_reaches_its_own_paths_for_pooling_too():
    unpatched, patched = (run("0.23.0", REACHED, patches=p) for p in ("none", "attention_router"))
    print(unpatched, patched, sep="\n")
    encoder = ["_forward_encoder_attention", 20]
    for name in ("pooling", "hit", "not causal", "pooling producer"):
        assert unpatched[name] == [[encoder], 20]
    assert unpatched["producer"] == [[["forward_impl", 20]], 20]
    assert patched["pooling"] == [[["_forward_c8_chunked_prefill", 20]], 20]
    assert patched["hit"] == [[["_forward_c8_fused_infer_attention", 20]], 20]
    assert patched["generate"] == unpatched["generate"] == patched["pooling"]
    assert patched["not causal"] == unpatched["not causal"]
    # A prefill node's layers take the base class's operators, and with them the window's number.
    assert patched["producer"] == patched["pooling producer"] == [[["forward_impl", 19]], 20]

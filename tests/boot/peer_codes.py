"""What runs in a process where somebody else changes vLLM too: real layers, an oracle, spans."""

from __future__ import annotations

# A neighbour of wrapt's post-import hooks and OpenTelemetry's spans, as an instrumentation is
# made. It runs the sitecustomize behind it, as ddtrace's does.
NEIGHBOUR = """
import os, sys
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import wrapt
spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
tracer = provider.get_tracer("neighbour")
sys.neighbour = sys.modules[__name__]

def traced(wrapped, instance, args, kwargs):
    with tracer.start_as_current_span(wrapped.__qualname__):
        return wrapped(*args, **kwargs)

@wrapt.when_imported("vllm.model_executor.layers.rotary_embedding.base")
def on_rotary(module):
    wrapt.wrap_function_wrapper(module, "RotaryEmbedding.forward_native", traced)

here = os.path.dirname(os.path.abspath(__file__))
if {chains!r}:
    place = sys.path.index(here)
    del sys.path[place], sys.modules["sitecustomize"]
    try:
        import sitecustomize
    finally:
        sys.path.insert(place, here)
"""

# Defines `layer`, `inputs()` and `error(outputs)`: vLLM's own rotary layer in float32 against
# complex rotation in float64.
ROTARY = """
import inspect, json, sys
import numpy, torch
torch.set_num_threads(1)
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import base
import ascend_patch
HEAD, TURNED, ROWS, HEADS, TOKENS = 96, 64, 128, 3, 11
with set_current_vllm_config(VllmConfig()):
    layer = base.RotaryEmbedding(HEAD, TURNED, ROWS, 10000.0, True, torch.float32)

def inputs(generator=torch.Generator().manual_seed(SEED)):
    positions = torch.randint(0, ROWS, (TOKENS,), generator=generator)
    query, key = (torch.randn(TOKENS, HEADS * HEAD, generator=generator) for _ in range(2))
    return positions, query, key

def error(call):
    positions, query, key = inputs()
    angles = positions.numpy()[:, None] / 10000.0 ** (numpy.arange(0, TURNED, 2) / TURNED)
    turns = numpy.exp(1j * angles)[:, None]
    worst = 0.0
    for before, after in zip((query, key), call(positions, query.clone(), key.clone())):
        x = before.double().numpy().reshape(TOKENS, HEADS, HEAD).copy()
        half = TURNED // 2
        turned = (x[..., :half] + 1j * x[..., half:TURNED]) * turns
        x[..., :half], x[..., half:TURNED] = turned.real, turned.imag
        found = after.double().numpy().reshape(x.shape)
        assert numpy.isfinite(found).all()
        worst = max(worst, float(abs(found - x).max()))
    return worst

def rotary():
    return next(p for p in ascend_patch.status()["patches"] if p["id"] == "rotary")

def target():
    name = base.__name__ + ":RotaryEmbedding.forward_native"
    return next(target for target in rotary()["targets"] if target["id"] == name)
"""

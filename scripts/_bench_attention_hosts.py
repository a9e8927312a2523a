"""What patch_attention_router costs the host in vllm-ascend: rows for scripts/bench attention.

The releases run as in tests/ascend, over the real torch_npu on stub libraries, the method that we
wrap and the wrapper by turns; their operators return at once, so that what is left is the host's
time. Without the environments of those tests (which they build) there is nothing to measure with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.13.0", "0.18.0", "0.23.0")
REQUESTS = (1, 32, 256)

CODE = """
import statistics, time, types
import vllm.forward_context as forward_context

def at_once():
    'Operators that return at once.'
    empty = torch.empty(0)
    given = {
        "npu::npu_fused_infer_attention_score": lambda query, *_, **__: (query, empty),
        "npu::npu_fused_infer_attention_score_v2": lambda query, *_, **__: (query, empty),
        "npu::npu_fusion_attention": lambda query, *_, **__: (query, *[empty] * 3, 0, 0, 0),
        "atb::_npu_reshape_and_cache": lambda *_, **__: None,
    }
    libraries = []
    for name, function in given.items():
        namespace, _, rest = name.partition("::")
        library = torch.library.Library(namespace, "IMPL")
        library.impl(rest, function, "CPU", allow_override=True)
        libraries.append(library)
    return libraries

def figures(calls):
    'p50 and p95 of the microseconds of a call, of each by turns: a machine changes its speed.'
    for call in calls * 50:
        call()
    samples = [[] for _ in calls]
    for _ in range(300):
        for call, kept in zip(calls, samples):
            begun = time.perf_counter()
            for _ in range(10):
                call()
            kept.append((time.perf_counter() - begun) * 1e5)
    return [[round(statistics.median(kept), 2), round(sorted(kept)[285], 2)] for kept in samples]

def forward(kind, requests):
    window = 20 if "window" in kind else None
    runner = "pooling" if "pooling" in kind else "generate"
    model = Model(window=window, runner=runner, heads=2, kv_heads=1, size=64, dtype="bfloat16")
    each, state = (1, "DecodeOnly") if "decode" in kind else (4, "ChunkedPrefill")
    batch = Batch(model, [30] * requests, [each] * requests, state)
    metadata = batch.metadata()
    output = torch.empty_like(batch.query)
    context = types.SimpleNamespace(capturing=False, is_draft_model=False, attn_metadata=None)
    forward_context._forward_context = context
    given = model.layer, batch.query, batch.key, batch.value, batch.cache, metadata
    patched, kind = model.impl.forward, type(model.impl)
    unpatched = kind.forward.__wrapped__.__get__(model.impl, kind)
    return [lambda run=run: run(*given, output=output) for run in (unpatched, patched)]

kept = at_once()
operators.record = False
print(json.dumps({f"{kind}/{n}": figures(forward(kind, n)) for kind in KINDS for n in REQUESTS}))
"""
KINDS = ("decode", "chunked", "decode, window", "chunked, window", "chunked, pooling")


def measure(_timed: Callable[..., Any]) -> list[dict[str, Any]]:
    """Rows of each release: `forward` unpatched and patched, by kind of step and requests."""
    sys.path[:0] = [str(ROOT / "tests/ascend"), str(ROOT / "scripts")]
    from ascend_attention_runs import run
    from environment import Environment

    rows = []
    code = f"KINDS, REQUESTS = {KINDS!r}, {REQUESTS!r}\n{CODE}"
    for release in RELEASES:
        if not (Environment(release).folder / "built").exists():
            print(f"vllm-ascend {release} is not measured: its tests have not built it here")
            continue
        found = run(release, code)
        for name, pair in found.items():
            kind, _, requests = name.partition("/")
            for what, (p50, p95) in zip(("unpatched", "patched"), pair, strict=True):
                row = {"what": f"{release} {what}", "kind": kind, "requests": int(requests)}
                rows.append({**row, "p50_us": p50, "p95_us": p95})
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(print), indent=1))

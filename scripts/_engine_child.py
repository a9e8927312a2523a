"""One run of vLLM's engine for scripts/bench engine, in a process of its own."""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

from _engine_model import MODELS, VOCABULARY, WORKLOADS, produced

ROUNDS = 5
# What the CUDA runtime and torch call it when the host waits for the device, and when it reads a
# number from there.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero")


def main(order: dict[str, Any]) -> int:
    import torch
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    model = MODELS[order["kind"]]
    settings: dict[str, Any] = {"compilation_config": {"custom_ops": ["none"]}, **model.settings}
    if order["mode"] == "eager":
        settings |= {
            "enforce_eager": True,
            "compilation_config": {"mode": 0, "custom_ops": ["none"]},
        }
    if order["device"] == "cuda":
        import triton

        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
        )
        settings |= {"attention_config": {"backend": "TRITON_ATTN"}, "gpu_memory_utilization": 0.4}
    llm = LLM(
        order["model"],
        dtype=order["dtype"],
        skip_tokenizer_init=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        async_scheduling=True,
        **settings,
    )
    if order["control"]:
        llm.apply_model(model.spoil)
    ready = time.perf_counter() - began
    # More than are compared: the last of those may have fallen behind others elsewhere.
    answers = generate(llm, SamplingParams, 8, 48, 32, logprobs=20)
    seconds: dict[str, list[float]] = {}
    stalls: dict[str, int] = {}
    if order["dtype"] == "bfloat16":
        for name, workload in WORKLOADS.items():
            generate(llm, SamplingParams, *workload)
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                generate(llm, SamplingParams, *workload)
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
        stalls = profiled(llm, lambda: generate(llm, SamplingParams, *WORKLOADS["prefill"]))
    shim = state()
    names = [n for n in shim.counters.names if n.startswith("kernel/")] if shim else []
    kernels = {name: shim.counters.value(name) for name in names}
    tested = [f"{patch}: {found}" for patch, found in (shim.self_tests if shim else {}).items()]
    rates = [f"{n} {produced(n) / sorted(s)[len(s) // 2]:.0f} tokens/s" for n, s in seconds.items()]
    told = [f"ready in {ready:.0f} s", *rates, f"calls {kernels}", *tested]
    told += [f"prefill: {stalls}"] if stalls else []
    first = [answer.outputs[0].logprobs[0] for answer in answers]
    Path(order["out"]).write_text(
        json.dumps(
            {
                "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
                "first": [{str(t): p.logprob for t, p in top.items()} for top in first],
                "seconds": seconds,
                "stalls": stalls,
                "kernels": kernels,
                "summary": "; ".join(told),
            }
        )
    )
    return 0


def generate(
    llm: Any, params: Any, prompts: int, length: int, new: int, logprobs: int | None = None
) -> Any:
    import random

    chosen = random.Random(length)
    rows = [[chosen.randrange(VOCABULARY) for _ in range(length)] for _ in range(prompts)]
    greedy = params(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs
    )
    return llm.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)


def profiled(llm: Any, run: Any) -> dict[str, int]:
    """The steps of `run`; how often the host waits for the device, and reads numbers there."""
    from torch.profiler import ProfilerActivity, profile

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, steps = scheduler.schedule, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = schedule(*args, **kwargs)
        steps.append(found.total_num_scheduled_tokens)
        return found

    scheduler.schedule = counted
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
    finally:
        scheduler.schedule = schedule
    counts = collections.Counter(event.name for event in found.events())
    return {
        "steps": sum(tokens > 0 for tokens in steps),
        "waits": sum(counts[name] for name in WAITS),
        "reads": sum(counts[name] for name in READS),
    }


def state() -> Any:
    """What the shim has recorded of this process; None where nothing is patched."""
    runtime = sys.modules.get("ascend_patch._runtime")
    return runtime.current().state if runtime else None


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

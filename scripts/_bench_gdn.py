"""Prefill of the gated delta rule on a CUDA device, beside its peers: scripts/bench gdn.

Qwen3-Next's heads at TP 1, 2, 4 and 8, bfloat16, lengths normalised in the kernel, states in and
out. Before anything is timed each result is compared with the recurrence in fp64; `error` is the
relative root mean square of the outputs. A time is that of a call as an eager layer makes it, p50
and p95; `host_ms` is how long the host is held by a call behind 20 ms of queued work: where that is
20 ms, it waits for the device. `floor` is a device copy of the bytes that must be read and written.

Peers: vLLM's own Triton kernels with chunk metadata of an earlier call (`vllm cached`) and of a new
batch, as at each step of an engine (`vllm fresh`), and fla-core's. Ours is given the metadata that
the patched builder makes; `ours with metadata` makes it in the call, in pinned memory.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _gdn_rivals as rivals
from _bench_rope import copy, machine, write_csv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QUEUED_MS = 20.0
LAYERS = 3
# Five roundings to bfloat16 on the way to a result; vLLM's own are measured beside it.
LIMIT = 6e-3
COLUMNS = ("case", "tp", "tokens", "what", "p50_ms", "p95_ms", "host_ms", "error", "state_error")
TIMELINE = ("what", "row", "begin_ms", "end_ms")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench gdn", description=__doc__)
    parser.add_argument("--site", default="", help="a folder with vLLM and what it needs")
    parser.add_argument("--fla", default="", help="a folder with fla-core")
    parser.add_argument(
        "--tp", type=int, nargs="*", default=(1, 2, 4, 8), help="none: the timeline alone"
    )
    parser.add_argument("--out", type=Path, help="folder for gdn.csv, the plot and the timeline")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench gdn needs a CUDA device: torch.cuda.is_available() is False here.")
        return 1
    import triton

    from ascend_patch.kernels.gdn import cases, chunk_triton

    chunk_triton.register()
    # Peers' kernels ask for scratch memory.
    triton.set_allocator(
        lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda")
    )
    peers = {"vllm": rivals.vllm(arguments.site), "fla": rivals.fla(arguments.fla)}
    facts = machine(arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(" ".join(f"{column:>18}" for column in COLUMNS))
    rows: list[dict[str, Any]] = []
    for case in cases.serving_cases(tuple(arguments.tp)):
        rows += measure(replace(case, sliced=False), peers)
    spans = timeline(replace(cases.serving_cases((4,))[0], sliced=False), peers["vllm"])
    if arguments.out:
        import _gdn_pictures as pictures

        arguments.out.mkdir(parents=True, exist_ok=True)
        if rows:
            write_csv(arguments.out / "gdn.csv", rows, facts, COLUMNS)
        write_csv(arguments.out / "gdn_timeline.csv", spans, facts, TIMELINE)
        pictures.write(arguments.out)
    return verdict(rows)


def calls(case: Any, peers: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], Any, Any]:
    """name -> a call that returns (o, states); the case's arguments; its sequences."""
    import torch

    from ascend_patch.kernels import gdn
    from ascend_patch.kernels.gdn import cases

    arguments = cases.make_inputs(case, 1, "cuda")
    metadata = arguments["chunk_metadata"]
    starts = torch.tensor(metadata.starts, dtype=torch.int32)
    staging = gdn.PinnedStaging(torch.device("cuda"))
    tensors = [arguments[name] for name in ("q", "k", "v", "g", "beta")]
    shared = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}

    def ours(chunks: Any = metadata) -> Any:
        return gdn.chunk_gated_delta_rule(**{**arguments, "chunk_metadata": chunks})

    def with_metadata() -> Any:
        device = torch.device("cuda")
        return ours(gdn.build_chunk_metadata(starts, device, staging=staging))

    found = {"ours": ours, "ours with metadata": with_metadata}
    state, on_device = arguments["initial_state"], metadata.cu_seqlens
    if peers["vllm"]:

        def cached(cu: Any = on_device) -> Any:
            return peers["vllm"](*tensors, initial_state=state, cu_seqlens=cu, **shared)

        found["vllm cached"] = cached
        found["vllm fresh"] = lambda: cached(on_device.clone())
    if peers["fla"]:
        group = case.value_heads // case.key_heads
        wide = [x.repeat_interleave(group, 2) for x in tensors[:2]] + tensors[2:]
        turned, cu = state.transpose(-1, -2).contiguous(), on_device.long()

        def fla() -> Any:
            o, final = peers["fla"](*wide, initial_state=turned, cu_seqlens=cu, **shared)
            return o, final.transpose(-1, -2)

        found["fla"] = fla
    return found, arguments, metadata


def measure(case: Any, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one batch and one number of heads."""
    import torch
    from triton.testing import do_bench

    found, arguments, metadata = calls(case, peers)
    wanted, states = rivals.recurrence(arguments, metadata.starts)
    name, _, tp = str(case.name).rpartition("-tp")
    rows = []
    for what, call in found.items():
        o, final = call()
        errors = rivals.apart(o[0], wanted), rivals.apart(final, states)
        if what.startswith("ours") and max(errors) > LIMIT:
            raise SystemExit(f"{case}: ours is {max(errors):.2g} off; nothing was timed.")
        p50, p95 = do_bench(call, warmup=10, rep=40, quantiles=[0.5, 0.95])
        rows.append((name, int(tp), case.tokens, what, p50, p95, held(call), *errors))
    least = [arguments[n] for n in ("q", "k", "v", "v", "g", "beta")]
    least += [arguments["initial_state"]] * 2
    size = sum(x.numel() * x.element_size() for x in least) // 2
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    p50, p95 = do_bench(lambda: copy(target, source), warmup=5, rep=10, quantiles=[0.5, 0.95])
    rows.append((name, int(tp), case.tokens, "floor", p50, p95, "", "", ""))
    for row in rows:
        print(" ".join(f"{shown(value):>18}" for value in row), flush=True)
    return [dict(zip(COLUMNS, map(shown, row), strict=True)) for row in rows]


def shown(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def queue() -> None:
    """About `QUEUED_MS` of work on the device."""
    import torch

    torch.cuda._sleep(int(QUEUED_MS * 1.98e6))


def held(call: Callable[[], Any]) -> float:
    """Milliseconds of the host in one call behind queued work; median of 5."""
    import torch

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        queue()
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
    return sorted(times)[2]


def timeline(case: Any, vllm: Any) -> list[dict[str, Any]]:
    """When the host is in each of `LAYERS` calls of a step, and when the device is."""
    import torch

    found, _, _ = calls(case, {"vllm": vllm, "fla": None})
    spans: list[dict[str, Any]] = []
    for what in ("vllm fresh", "ours with metadata"):
        if what not in found:
            continue
        for _ in range(2):
            torch.cuda.synchronize()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(LAYERS + 2)]
            zero = time.perf_counter()
            marks[0].record()
            queue()
            marks[1].record()
            host = []
            for layer in range(LAYERS):
                begin = time.perf_counter()
                found[what]()
                host.append((1e3 * (begin - zero), 1e3 * (time.perf_counter() - zero)))
                marks[layer + 2].record()
            torch.cuda.synchronize()
        at = [marks[0].elapsed_time(mark) for mark in marks]
        rows = [("host", *span) for span in host] + [("queued", 0.0, at[1])]
        rows += [("device", *pair) for pair in itertools.pairwise(at[1:])]
        spans += [dict(zip(TIMELINE, (what, *map(shown, r)), strict=True)) for r in rows]
    return spans


def verdict(rows: list[dict[str, Any]]) -> int:
    """1 where a batch is slower than the better peer, with a line for each."""
    slower = 0
    for ours in (r for r in rows if r["what"] == "ours"):
        same = [r for r in rows if (r["case"], r["tp"]) == (ours["case"], ours["tp"])]
        best = [float(r["p50_ms"]) for r in same if r["what"].startswith(("vllm", "fla"))]
        if best and float(ours["p50_ms"]) > min(best):
            slower += 1
            print(f"{ours['case']} TP {ours['tp']}: {ours['p50_ms']} ms, a peer's {min(best)} ms")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What routing attention costs the host, per layer call: scripts/bench attention.

Nothing here says how fast an operator is. First `attend` is held to a dense computation in fp64, on
the operator surface. Then the operators are replaced by ones that return at once, and three things
are timed: `route` for a case that was asked before, and for one that was not; `attend` for the
first layer of a step, which sorts the batch, and for the layers after it; and the operator's own
call with arguments that are ready. What `attend` takes beyond that call is its overhead: slices,
checks and the copy into the output.

A module `scripts/_bench_attention_hosts.py` may add rows of patched hosts: its
`measure(timed) -> list of rows` gets `timed(*calls) -> [(p50, p95), ...]`, in microseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _attention_steps import KINDS, Step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SAMPLES = 100
# Of one sample: long enough for the clock, short enough for an interruption to be an outlier.
SAMPLE_US, LONGEST_S = 500, 1.0
ROUTE_TARGET_US = 5.0
REQUESTS = (1, 32, 256)
COLUMNS = ("what", "kind", "requests", "p50_us", "p95_us", "beyond_operator_us")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench attention", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for attention.csv")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    wrong = check()
    if wrong:
        print(f"{wrong}: nothing was timed.")
        return 1
    facts = machine(arguments.commit)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    silence()
    rows = routing() + [row for kind in KINDS for n in REQUESTS for row in attending(kind, n)]
    rows += hosts()
    for row in rows:
        figures = f"{row['p50_us']:>9} {row['p95_us']:>9} {row.get('beyond_operator_us', ''):>9}"
        print(f"{row['what']:<28} {row['kind']:<30} {row.get('requests', ''):>5} {figures}")
    if arguments.out:
        from _bench_rope import write_csv

        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / "attention.csv", rows, facts, COLUMNS)
    slow = [row for row in rows if row["what"] == "route" and row["p50_us"] > ROUTE_TARGET_US]
    for row in slow:
        print(f"{row['kind']} takes {row['p50_us']} us; the target is {ROUTE_TARGET_US}")
    return int(bool(slow))


def machine(commit: str) -> dict[str, str]:
    import torch

    if not commit:
        call = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(call, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "device": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check() -> str:
    """What is wrong with `attend` on the operator surface, or nothing."""
    import torch

    from ascend_patch.kernels.npu_ops import surface

    torch.manual_seed(0)
    surface.install()
    with surface.settings(allow=("float32",)):
        for kind in KINDS:
            step = Step(kind, 3, torch.float32)
            step.out.fill_(float("nan"))
            step.attend(step.batch())
            apart = (step.out.double() - step.dense()).abs().max().item()
            if not apart < 1e-5:
                return f"{kind} is off by {apart}"
    return ""


def silence() -> None:
    """Operators that return at once: what is left of a call is the host's."""
    import torch

    library = torch.library.Library("npu", "IMPL")
    globals()["_kept"] = library

    def infer(query: Any, *_args: Any, **_kwargs: Any) -> Any:
        return query.view_as(query), query

    def fusion(query: Any, *_args: Any, **_kwargs: Any) -> Any:
        return (query, query, query, query, 0, 0, 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kernel in (
            ("npu_fused_infer_attention_score", infer),
            ("npu_fused_infer_attention_score_v2", infer),
            ("npu_fusion_attention", fusion),
        ):
            library.impl(name, kernel, "CPU", allow_override=True)


def timed(*calls: Callable[[], Any]) -> list[tuple[float, float]]:
    """Median and 95th percentile of each call, in microseconds, over samples of many calls.

    The thread's own time, not the clock's, so that what else runs counts little. The calls take
    turns, so that a machine that slows down slows all of them.
    """

    def sample(call: Callable[[], Any], count: int) -> float:
        start = time.thread_time_ns()
        for _ in range(count):
            call()
        return (time.thread_time_ns() - start) / count / 1000

    for call in calls:
        call()
    about = [sample(call, 3) for call in calls]
    counts = [max(1, int(SAMPLE_US / one)) for one in about]
    round_us = sum(one * count for one, count in zip(about, counts, strict=True))
    rounds = max(20, min(SAMPLES, int(LONGEST_S * 1e6 / round_us)))
    samples = [
        [sample(call, count) for call, count in zip(calls, counts, strict=True)]
        for _ in range(rounds)
    ]
    return [
        (round(statistics.median(one), 2), round(statistics.quantiles(one, n=20)[-1], 2))
        for one in zip(*samples, strict=True)
    ]


def routing() -> list[dict[str, Any]]:
    from ascend_patch.kernels.attention.case import Case
    from ascend_patch.kernels.attention.route import route

    case, length = Case("chunked", sliding_window=4096, max_seq_len=77), iter(range(1, 10**9))
    calls: dict[str, Callable[[], Any]] = {
        "a case that is there": lambda: route(case),
        "and making the case": lambda: route(
            Case("chunked", sliding_window=4096, head_size=128, max_seq_len=77, batch=8)
        ),
    }
    calls["a case that is new"] = lambda: route(Case("chunked", max_seq_len=next(length)))
    rows = []
    for kind, (p50, p95) in zip(calls, timed(*calls.values()), strict=True):
        what = "route, once a step" if kind.endswith("new") else "route"
        rows.append({"what": what, "kind": kind, "p50_us": p50, "p95_us": p95})
    return rows


def attending(kind: str, requests: int) -> list[dict[str, Any]]:
    import torch

    step = Step(kind, requests, torch.bfloat16)
    batch = step.batch()
    seen: list[tuple[Any, Any, Any]] = []
    operator = operators(seen)
    step.attend(batch)
    operator.restore()
    measured = timed(
        lambda: step.attend(step.batch()),
        lambda: step.attend(batch),
        lambda: [call(*args, **kwargs) for call, args, kwargs in seen],
    )
    rows = []
    names = ("attend, first layer", "attend, further layers", "operator that returns")
    for what, (p50, p95) in zip(names, measured, strict=True):
        row = {"what": what, "kind": kind, "requests": requests, "p50_us": p50, "p95_us": p95}
        if what.startswith("attend"):
            row["beyond_operator_us"] = round(p50 - measured[2][0], 2)
        rows.append(row)
    return rows


class operators:
    """Notes the calls of `torch.ops.npu` that `attend` makes, with their arguments."""

    def __init__(self, seen: list[tuple[Any, Any, Any]]) -> None:
        import torch

        from ascend_patch.kernels.attention import calls

        self.module, self.torch = calls, calls.torch

        class Noting:
            def __init__(self, packet: Any) -> None:
                self.real = packet.default

            def default(self, *args: Any, **kwargs: Any) -> Any:
                seen.append((self.real, args, kwargs))
                return self.real(*args, **kwargs)

        class Namespace:
            def __getattr__(self, name: str) -> Any:
                return Noting(getattr(torch.ops.npu, name))

        class Torch:
            ops = type("Ops", (), {"npu": Namespace()})()

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        calls.torch = Torch()  # type: ignore[assignment]

    def restore(self) -> None:
        self.module.torch = self.torch


def hosts() -> list[dict[str, Any]]:
    """Rows of patched hosts, where there is a module that measures them."""
    path = Path(__file__).with_name("_bench_attention_hosts.py")
    if not path.is_file():
        print("no host is measured: scripts/_bench_attention_hosts.py is not there")
        return []
    spec = importlib.util.spec_from_file_location("_bench_attention_hosts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows: list[dict[str, Any]] = module.measure(timed)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""vLLM's own engine with and without the patches, side by side: scripts/bench engine.

Each run is a process of its own, so that off means off; runs with and without take turns. First
their answers are compared: the greedy tokens of random prompts in float32, beside a control, spoilt
as a patch's fault would spoil it, that must answer something else. Only then throughput is looked
at, in bfloat16, and how often the host waits for the device or reads from it while prompts are
prefilled. The model is Qwen3's architecture, or with --model gdn that of dense Qwen3.5 (three of
four layers are gated delta nets), at random weights, made here: nothing is downloaded.

What it runs on is the vLLM that the interpreter finds (or --site names): a CUDA build, or its
Python sources over Triton where there is no compiled part, which is what an Ascend machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _engine_model import MODELS, produced

ROOT = Path(__file__).resolve().parents[1]
CHILD = Path(__file__).with_name("_engine_child.py")

COLUMNS = ("mode", "dtype", "patches", "round", "what", "equal_tokens", "tokens_s")
COLUMNS += ("seconds_p50", "seconds_max", "steps", "waits", "reads")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench engine", description=__doc__)
    parser.add_argument("--site", default="", help="folders of vLLM and what it needs")
    parser.add_argument("--model", default="qwen3", choices=sorted(MODELS))
    parser.add_argument("--patches", default="all", help="what ASCEND_PATCHES is set to")
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turns")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--deadline", type=float, default=240, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="folder for engine.csv or engine_gdn.csv")
    parser.add_argument("--commit", default="", help="what to record where git is not there")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write = MODELS[arguments.model].write
        write(Path(folder), hidden=arguments.hidden, layers=arguments.layers)
        return compare(arguments, folder)


def compare(arguments: argparse.Namespace, folder: str) -> int:
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    model = MODELS[arguments.model]

    def one(mode: str, dtype: str, patches: str, control: bool = False) -> dict[str, Any] | None:
        what = f"{mode} {dtype} {'patches ' + patches if patches else 'unpatched'}"
        what += f", {model.control}" if control else ""
        order = {"model": folder, "kind": arguments.model, "mode": mode, "dtype": dtype}
        order["control"] = control
        found = start({**order, "device": arguments.device}, patches, arguments)
        if isinstance(found, str):
            wrong.append(f"{what}: {found}")
            print(f"{what}: {found}", flush=True)
            return None
        print(f"{what}: {found['summary']}", flush=True)
        return found

    def timed(found: dict[str, Any] | None, mode: str, patches: str, turn: int) -> None:
        for name, seconds in (found["seconds"] if found else {}).items():
            rows.append(
                {
                    "mode": mode,
                    "dtype": "bfloat16",
                    "patches": patches or "none",
                    "round": turn,
                    "what": name,
                    "tokens_s": round(produced(name) / statistics.median(seconds), 1),
                    "seconds_p50": round(statistics.median(seconds), 4),
                    "seconds_max": round(max(seconds), 4),
                    **(found["stalls"] if found and name == "prefill" else {}),
                }
            )

    for mode in arguments.modes:
        plain, ours = one(mode, model.answers, ""), one(mode, model.answers, arguments.patches)
        control = one(mode, model.answers, arguments.patches, control=True)
        if not (plain and ours and control):
            continue
        same, apart = agreement(plain, ours)
        control_same, control_apart = agreement(plain, control)
        print(f"  greedy tokens equal: {same:.1%}, log-probabilities apart {apart:.2e}")
        print(f"  {model.control}: {control_same:.1%}, apart {control_apart:.2e}", flush=True)
        if same < 1 and model.answers == "float32":
            wrong.append(f"{mode}: {1 - same:.1%} of the greedy tokens differ")
        if not apart * 3 < control_apart:
            wrong.append(f"{mode}: {apart:.2e} apart, and the control no more than three times it")
        if control_same > 0.9:
            wrong.append(f"{mode}: the control answers the same; this model cannot tell")
        if not ours["kernels"]:
            wrong.append(f"{mode}: no kernel of ours was called")
        rows.append({"mode": mode, "dtype": model.answers, "what": "answers", "equal_tokens": same})
        timed(plain, mode, "", -1)
        timed(ours, mode, arguments.patches, -1)
        for turn in range(arguments.rounds):
            for patches in ("", arguments.patches):
                timed(one(mode, "bfloat16", patches), mode, patches, turn)
    if arguments.out and rows:
        from _bench_rope import machine, write_csv

        facts = machine(arguments.commit) if arguments.device == "cuda" else {}
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / model.file, rows, facts, COLUMNS)
    for sentence in wrong:
        print(f"scripts/bench engine: {sentence}")
    return 1 if wrong else 0


def agreement(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Share of equal greedy tokens, and the largest distance of the first log-probabilities.

    Those are of the five likeliest tokens of `one`, each of which `other` has among its twenty.
    """
    pairs = [
        a == b
        for mine, theirs in zip(one["tokens"], other["tokens"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    apart = max(
        abs(mine[token] - theirs[token]) if token in theirs else float("inf")
        for mine, theirs in zip(one["first"], other["first"], strict=True)
        for token in list(mine)[:5]
    )
    return sum(pairs) / len(pairs), apart


def start(order: dict[str, Any], patches: str, arguments: argparse.Namespace) -> dict | str:
    """Run one child to its end; its result, or why there is none."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND_PATCHES")}
    paths = [str(ROOT), arguments.site, os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    quiet = ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    environment |= dict.fromkeys(quiet, "1") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment["ASCEND_PATCHES_STATUS_DIR"] = folder
        if order["dtype"] == "float32":
            # Triton's tf32 would turn a difference in the last place into one of a thousandth.
            environment["TRITON_F32_DEFAULT"] = "ieee"
        if patches:
            asked = {"": patches, "_STRICT": "1", "_SELFTEST": "1"}
            environment |= {f"ASCEND_PATCHES{name}": value for name, value in asked.items()}
        command = [sys.executable, str(CHILD), json.dumps({**order, "out": str(result)})]
        log = Path(folder) / "log"
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=arguments.deadline,
                ).returncode
            except subprocess.TimeoutExpired:
                return f"not ready after {arguments.deadline:.0f} s"
        if done or not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            return f"ended with {done}:\n{tail}"
        return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

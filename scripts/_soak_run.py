"""One long run of scripts/soak: a patched server under load, watched, then spoilt on purpose."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _env
import _pair
import _soak_pace
from _pair import PatchSeen
from _serve import tiny_model
from _server import Server, ServerError
from _soak_load import Load
from _soak_memory import MIB, Growth, Watch
from _soak_pace import Pace
from _system import SetupError, say

LEAK_PLUGIN = _env.CHECKOUT / "tests" / "e2e" / "leak_plugin"
LEAK_VARIABLE = "E2E_LEAK_FILE"
LEAK = 2 * MIB  # bytes a second, in each process of vLLM's
CONTROL_SECONDS = 24.0
SAY_SECONDS = 15.0
DRAIN_SECONDS = 120.0
# Before memory is watched: until every size of a step has been there. Seen to level after 650.
WARM_REQUESTS, WARM_SECONDS = 1000, 90.0
CANARIES = ("The people know how to make", "one two three four five six seven")
# vLLM's own counters.
GENERATED, READ = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
# Few blocks, so that each is soon used: the cache's pages are resident from then on, and requests
# are preempted. Small steps: with any number of tokens in a step a server grew for minutes, with 64
# for twenty seconds; oneDNN seems to keep a kernel for each number.
ARGUMENTS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--num-gpu-blocks-override", "48", "--max-num-seqs", "16"),
    *("--max-num-batched-tokens", "64"),
)


@dataclass
class Report:
    """What a run showed.

    Attributes:
        minutes: Of load.
        sent: Requests by kind.
        tokens: Prompt tokens and generated ones.
        growths: Of each process under load.
        patches: What became of each patch.
        pace: What the shim costs.
        control: Of each process while all of vLLM's leaked on purpose.
        wrong: Everything that should not be, as sentences.
    """

    release: str
    minutes: float
    date: str
    commit: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    tokens: tuple[int, int] = (0, 0)
    growths: list[Growth] = field(default_factory=list)
    patches: dict[str, PatchSeen] = field(default_factory=dict)
    pace: Pace | None = None
    control: list[Growth] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def soak(
    env: _env.Environment, release: str, folder: Path, *, minutes: float, rounds: int, seed: int
) -> Report:
    """Load a patched server for so many minutes and return what that showed.

    Args:
        folder: For logs, status files and the samples.
        rounds: Of the comparison with an unpatched server.

    Raises:
        ServerError: A server does not start.
        SetupError: It cannot be said what was asked for, for example after too few samples.
    """
    began = time.monotonic()
    model = tiny_model(env, "qwen3", "float32")
    leak = folder / "leak"
    leak.parent.mkdir(parents=True, exist_ok=True)
    leak.write_text("")
    patched = _pair.make_server(
        env,
        model,
        folder / "patched",
        patches="all",
        arguments=ARGUMENTS,
        path=[LEAK_PLUGIN],
        more={LEAK_VARIABLE: str(leak)},
    )
    unpatched = _pair.make_server(
        env, model, folder / "unpatched", patches=None, arguments=ARGUMENTS
    )
    report = Report(release, minutes, _pair.today(), _pair.commit(), seed)
    try:
        # At once: a machine has two cores, and a start is half waiting.
        patched.start()
        unpatched.start()
        for server in (patched, unpatched):
            server.wait_until_ready()
        say(f"both servers are ready after {time.monotonic() - began:.0f} s")
        _run(patched, unpatched, report, leak, folder, rounds)
    finally:
        patched.stop()
        unpatched.stop()
    report.seconds = time.monotonic() - began
    return report


def _run(
    patched: Server, unpatched: Server, report: Report, leak: Path, folder: Path, rounds: int
) -> None:
    load = Load(patched, report.seed)
    before = _canaries(patched)
    with load.running():
        ends = time.monotonic() + WARM_SECONDS
        while load.sent.total() < WARM_REQUESTS and time.monotonic() < ends:
            time.sleep(0.5)
    say(f"warm after {load.sent.total()} requests")
    with _watched(patched) as watch, load.running():
        _wait(patched, load, report, 60 * report.minutes)
    _drained(patched, report)
    report.tokens = (int(patched.metric(READ)), int(patched.metric(GENERATED)))
    report.sent = Counter(load.sent)
    report.pace = _soak_pace.measure(patched, unpatched, rounds)
    say(f"the shim's overhead: {report.pace}")
    if _canaries(patched) != before:
        report.wrong.append("the same prompts have other answers after the load than before")
    run = _pair.status(patched)
    report.patches = _pair.patches_seen(run)
    report.versions = run["processes"][0]["versions"]
    report.wrong += _pair.faults(run)
    roles = {process["pid"]: process["role"] for process in run["processes"]}
    report.growths = watch.growths(roles)
    _write_samples(folder / "samples.csv", watch, roles)
    report.wrong += [sentence(one) for one in report.growths if not one.fine]
    # vLLM asks for a model's class in a process that ends before there is load.
    missing = (roles.keys() & watch.samples.keys()) - {one.pid for one in report.growths}
    report.wrong += [f"{roles[pid]} (process {pid}) was not there to the end" for pid in missing]

    say(f"the control: each process keeps {LEAK / MIB:.0f} MiB a second")
    leak.write_text(str(LEAK))
    with _watched(patched) as watch, load.running():
        _wait(patched, load, report, CONTROL_SECONDS)
    leak.write_text("")
    report.control = watch.growths(roles)
    found = {one.pid for one in report.control if not one.fine}
    leaking = roles.keys() & {one.pid for one in report.growths}
    report.wrong += [
        f"{roles[pid]} (process {pid}) leaked on purpose and nothing was noticed"
        for pid in leaking - found
    ]
    report.wrong += load.failures


def sentence(growth: Growth) -> str:
    """Say that a process grew."""
    return (
        f"{growth.name} (process {growth.pid}) grew by {growth.grown / MIB:.1f} MiB in the last "
        f"{growth.seconds:.0f} s, and {growth.tolerance / MIB:.0f} MiB is the tolerance"
    )


def _watched(server: Server) -> Watch:
    assert server.process is not None
    return Watch(server.process.pid)


def _wait(server: Server, load: Load, report: Report, seconds: float) -> None:
    """Let the load run, say how it goes, and look at the states; end early where it is over."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, SAY_SECONDS))
        assert server.process is not None
        if server.process.poll() is not None:
            raise ServerError(
                f"The server ended with exit code {server.process.returncode} under load. Its log: "
                f"{server.log}"
            )
        for fault in _pair.faults(_pair.status(server)):
            if fault not in report.wrong:
                report.wrong.append(fault)
        left = max(0.0, ends - time.monotonic())
        failed = f", {load.failures[-1]}" if load.failures else ""
        say(f"{load.sent.total()} requests, {left:.0f} s to go{failed}")


def _drained(server: Server, report: Report) -> None:
    """Wait until the server has nothing to do; what was aborted must not stay."""
    ends = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < ends:
        if not server.metric(RUNNING) and not server.metric(WAITING):
            return
        time.sleep(0.5)
    report.wrong.append(
        f"{server.metric(RUNNING):.0f} requests run and {server.metric(WAITING):.0f} wait "
        f"{DRAIN_SECONDS:.0f} s after the last client has left"
    )


def _canaries(server: Server) -> list[Any]:
    """Return what is said to fixed prompts, asked alone."""
    return [
        server.complete(prompt, max_tokens=24, ignore_eos=True)["choices"][0]["text"]
        for prompt in CANARIES
    ]


def _write_samples(file: Path, watch: Watch, roles: Mapping[int, str]) -> None:
    lines = ["process,pid,seconds,resident"]
    begins = min(samples[0][0] for samples in watch.samples.values())
    for pid, samples in watch.samples.items():
        name = roles.get(pid, watch.names[pid])
        lines += [f"{name},{pid},{at - begins:.1f},{size}" for at, size in samples]
    file.write_text("\n".join(lines) + "\n")


def check_minutes(minutes: float) -> None:
    """Raise SetupError where a run is too short to fit a slope."""
    if minutes < 0.5:
        raise SetupError(
            f"{minutes:g} minutes are too few to see memory grow; half a minute is the least."
        )

"""Shows what a run of scripts/soak found, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from _soak_load import THREADS
from _soak_memory import MIB, Growth
from _soak_run import CONTROL_SECONDS, LEAK, Report

INTRODUCTION = """\
# A patched server under load

Written by `scripts/soak --minutes {minutes:g} --out docs/soak.md`: vLLM {release} (torch {torch})
with `ASCEND_PATCHES=all`, on a CPU, {date}, commit {commit}, seed {seed}; the whole took
{seconds:.0f} s. A tiny Qwen3 with random weights in float32, eager, few KV blocks.
"""
MEMORY = """\
## Resident memory

One sample a second and process. The slope is a least-squares line through the second half of the
samples ({half:.0f} s); *grown* is what it makes of that half, and may be {tolerance:.0f} MiB at
most, whatever the length: what allocators keep and give back. In this run that finds leaks from
{least:.0f} KiB a minute, or {request:.1f} KiB a request.
"""
CONTROL = """\
The control: for {seconds:.0f} s each process of vLLM's keeps {leak:.0f} MiB a second, and must be
found.
"""


def to_markdown(report: Report) -> str:
    """Return the document."""
    first = max(report.growths, key=lambda one: one.seconds)
    least = first.tolerance / first.seconds * 60 / 1024
    sent = report.sent.total()
    parts = [
        INTRODUCTION.format(
            minutes=report.minutes,
            release=report.release,
            torch=report.versions.get("torch", "unknown"),
            date=report.date,
            commit=report.commit,
            seed=report.seed,
            seconds=report.seconds,
        ),
        _outcome(report),
        _load(report),
        MEMORY.format(
            half=first.seconds,
            tolerance=first.tolerance / MIB,
            least=least,
            request=least * report.minutes / max(sent, 1),
        ),
        _growths(report.growths, "fine", "grows"),
        CONTROL.format(seconds=CONTROL_SECONDS, leak=LEAK / MIB),
        _growths(report.control, "not found", "found"),
        _states(report),
        f"## The shim's overhead\n\n{report.pace}. Eager, one request at a time, nothing else "
        "asked of either server. It is the whole difference: what wraps vLLM's code, and our "
        "kernels against the release's own.\n",
    ]
    return "\n".join(parts)


def _outcome(report: Report) -> str:
    if not report.wrong:
        return "Nothing was found that should not be.\n"
    return "\n".join(["What should not be:", "", *(f"- {one}" for one in report.wrong), ""])


def _load(report: Report) -> str:
    read, said = report.tokens
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.sent.items()))
    return (
        f"{report.sent.total()} requests of {THREADS} clients at once ({kinds}); {read} tokens "
        f"read, {said} generated.\n"
    )


def _growths(growths: Sequence[Growth], fine: str, grows: str) -> str:
    head = "| process | first, MiB | last, MiB | slope, KiB a minute | grown, MiB | |"
    lines = [head, "|---|---|---|---|---|---|"]
    for one in growths:
        lines.append(
            f"| {one.name} | {one.first / MIB:.1f} | {one.last / MIB:.1f} | "
            f"{one.slope * 60 / 1024:+.0f} | {one.grown / MIB:+.2f} | "
            f"{fine if one.fine else grows} |"
        )
    return "\n".join([*lines, ""])


def _states(report: Report) -> str:
    lines = ["## States", "", "| patch | state | calls |", "|---|---|---|"]
    for name, seen in report.patches.items():
        lines.append(f"| `{name}` | {seen.state} | {seen.calls} |")
    return "\n".join([*lines, ""])

"""`ascend-patch verify`: every kernel's cases on the device that is there, as a report.

It asks nothing of vLLM and changes nothing: what it prints can be attached to a bug.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_patch import __version__, _selection

if TYPE_CHECKING:
    from ascend_patch.kernels.selftest import Suite, Trial

# In the order in which they are looked for.
DEVICES = ("npu", "cuda", "cpu")
SHOWN_FAILURES = 20


class VerifyUsageError(ValueError):
    """What was asked for cannot be done here; the message says what can."""


def verify(
    *,
    device: str = "",
    patch: str = "",
    case: str = "",
    everything: bool = False,
    seed: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Run cases, and yield first what they run on, then one result for each implementation.

    Args:
        device: npu, cuda or cpu; by default the first of them that is there.
        patch: Only the kernels of this patch.
        case: Only the case of this name, among all of them.
        everything: All cases, not only those for a quick look.
        seed: Of the inputs; a fresh one by default.

    Raises:
        ModuleNotFoundError: torch is not installed.
        VerifyUsageError: The device is not there, or there is no such patch or case.
    """
    import torch

    chosen = _device(device)
    seed = secrets.randbelow(2**31) if seed is None else seed
    selftest = importlib.import_module("ascend_patch.kernels.selftest")
    suites: list[Suite] = selftest.suites()
    if patch:
        patches = tuple(sorted({suite.patch for suite in suites}))
        name = _selection.canonical_id(patch)
        if name not in patches:
            raise VerifyUsageError(
                f"no kernel belongs to a patch {_selection.shown(patch)}; there are kernels for "
                f"{', '.join(patches)}"
            )
        suites = [suite for suite in suites if suite.patch == name]
    work = [(suite, _cases(suite, case, everything)) for suite in suites]
    if case and not any(cases for _, cases in work):
        raise VerifyUsageError(
            f"there is no case {_selection.shown(case)}; a report names those that failed"
        )
    yield _surroundings(torch, chosen, seed)
    for suite, cases in work:
        if cases:
            suite.offer(chosen)
            yield from _run(suite, cases, chosen, seed)


def _cases(suite: Suite, name: str, everything: bool) -> list[Any]:
    cases: Sequence[Any] = suite.cases(everything or bool(name))
    return [case for case in cases if not name or str(case) == name]


def _run(suite: Suite, cases: list[Any], device: str, seed: int) -> list[dict[str, Any]]:
    """One result for each implementation, tried with every case that it takes."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        trial = suite.trial(case, seed, device)
        names = [implementation.name for implementation in trial.candidates()] or ["nobody"]
        for name in names:
            result = found.setdefault(name, _nothing_yet(suite, name))
            result["cases"] += 1
            result["serves"] += name == names[0]
            begun = time.perf_counter()
            wrong = _try(trial, name, result)
            result["seconds"] += time.perf_counter() - begun
            if wrong:
                again = f"ascend-patch verify --device {device} --seed {seed} --case '{case}'"
                result["failed"].append({"case": str(case), "wrong": wrong, "repeat": again})
    return list(found.values())


def _nothing_yet(suite: Suite, name: str) -> dict[str, Any]:
    return {
        "operator": suite.operator,
        "patch": suite.patch,
        "implementation": name,
        "cases": 0,
        "serves": 0,
        "failed": [],
        "ulps": 0.0,
        "share": 0.0,
        "seconds": 0.0,
    }


def _try(trial: Trial, name: str, result: dict[str, Any]) -> str:
    dispatch = importlib.import_module("ascend_patch.kernels.dispatch")
    try:
        with dispatch.only(name):
            verdict = trial.judged()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not verdict.wrong:
        result["ulps"] = max(result["ulps"], verdict.ulps)
        result["share"] = max(result["share"], verdict.share)
    return verdict.wrong


def _device(wanted: str) -> str:
    torch: Any = sys.modules["torch"]
    with contextlib.suppress(ImportError):
        # torch.npu is there once this is imported.
        importlib.import_module("torch_npu")
    there = [
        name
        for name in DEVICES
        if name == "cpu" or (hasattr(torch, name) and getattr(torch, name).is_available())
    ]
    if wanted and wanted not in there:
        raise VerifyUsageError(
            f"torch {torch.__version__} sees no {wanted} device here; leave --device out, or use "
            f"{' or '.join(there)}"
        )
    return wanted or there[0]


def _surroundings(torch: Any, device: str, seed: int) -> dict[str, Any]:
    from ascend_patch import _versions

    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = getattr(torch, device).get_device_name()
    installed = _versions.find()
    return {
        "ascend_patch": __version__,
        "device": device,
        "device_name": name,
        "host": installed.host,
        "versions": {**installed.versions, "torch": torch.__version__},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seed": seed,
    }


def report(results: Iterator[dict[str, Any]], file: str, *, only_json: bool) -> int:
    """Print a report while the cases run, and write it as JSON where it is wanted.

    Args:
        file: Where JSON is written; empty is nowhere.
        only_json: JSON on standard output in place of the text.

    Returns:
        1 if a case failed, else 0.

    Raises:
        OSError: The file cannot be written.
    """
    found = next(results)
    found["kernels"] = []

    def say(text: str) -> None:
        if not only_json:
            print(text, flush=True)

    say(_head(found))
    for kernel in results:
        found["kernels"].append(kernel)
        say(_line(kernel))
    failed = [failure for kernel in found["kernels"] for failure in kernel["failed"]]
    found["ok"] = not failed
    for failure in failed[:SHOWN_FAILURES]:
        say(f"\n{failure['case']}\n  {failure['wrong']}\n  again: {failure['repeat']}")
    if len(failed) > SHOWN_FAILURES:
        say(f"\nand {len(failed) - SHOWN_FAILURES} more; --json FILE has them all")
    say("\nsomething is wrong: see above" if failed else "\nnothing is wrong")
    text = json.dumps(found, indent=1)
    if only_json:
        print(text)
    if file:
        Path(file).write_text(text + "\n", encoding="utf-8")
    return int(bool(failed))


def _head(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"ascend-patch {found['ascend_patch']} verify\n"
        f"device {found['device']} ({found['device_name']}), host {found['host']}\n"
        f"{versions}\n"
        f"Python {found['python']}, {found['system']}, {found['threads']} threads on "
        f"{found['cores']} cores\n"
        f"seed {found['seed']}\n\n"
        f"{'kernel':<23} {'implementation':<15} {'cases':>5} {'serves':>6} {'failed':>6}"
        f"{'99.9 % within':>15}{'worst/limit':>13} {'time':>8}"
    )


def _line(kernel: dict[str, Any]) -> str:
    return (
        f"{kernel['operator']:<23} {kernel['implementation']:<15} {kernel['cases']:>5} "
        f"{kernel['serves']:>6} {len(kernel['failed']):>6}{kernel['ulps']:>11.2f} ulp"
        f"{kernel['share']:>13.2f} {kernel['seconds']:>6.1f} s"
    )
